"""A model for tests of batches, which waits, or kills whoever uses it, where a text says so."""

import os
import time
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator


class Gated(BaseEstimator):
    """A stub whose propensity is the length of the text in percent."""

    def predict_proba(self, texts):
        if "wait" in texts:
            Path(f"waits {os.getpid()}").touch()
            while not Path(os.environ["GATE"]).exists():
                time.sleep(0.01)
        if "die" in texts:
            os._exit(1)
        share = np.minimum([len(text) / 100 for text in texts], 1)
        return np.column_stack([1 - share, share])
