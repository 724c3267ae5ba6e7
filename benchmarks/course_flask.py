"""The service as most submissions of the course have it: Flask's own server and predict_proba."""

import os

import joblib
from flask import Flask, request

app = Flask(__name__)
model = joblib.load("models/best_model.joblib")


@app.post("/score")
def score() -> dict[str, float | bool]:
    propensity = float(model.predict_proba([request.json["text"]])[0, 1])
    return {"prediction": propensity >= 0.5, "propensity": propensity}


if __name__ == "__main__":
    app.run(port=int(os.environ["PORT"]))
