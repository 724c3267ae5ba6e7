"""The model served by BentoML, which gathers the texts of concurrent requests into batches."""

import bentoml
import joblib


@bentoml.service(workers="cpu_count")
class SpamFilter:
    def __init__(self) -> None:
        self.model = joblib.load("models/best_model.joblib")

    @bentoml.api(batchable=True)
    def score(self, texts: list[str]) -> list[float]:
        return self.model.predict_proba(texts)[:, 1].tolist()
