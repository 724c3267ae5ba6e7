"""An empty Flask handler on the server of app.py, with its settings: no Flask handler there can be faster."""

from flask import Flask

from engine.server import serve

app = Flask(__name__)


@app.post("/score")
def score() -> str:
    return ""


if __name__ == "__main__":
    serve(lambda: app)
