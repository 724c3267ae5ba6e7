ARG BASE=python:3.11-slim
FROM ${BASE}

# Explanations are off: on a network they would tell a sender of spam which words to change. -e EXPLAIN=on asks for them.
ENV EXPLAIN=off \
    HOST=0.0.0.0 \
    PORT=5000 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app

# Before the files of the project, so that a new model or a changed line does not reinstall.
COPY requirements-serve.txt .
RUN pip install --no-cache-dir --only-binary :all: --root-user-action ignore -r requirements-serve.txt

COPY models/best_model.weights.json.gz models/best_model.json models/
COPY templates templates/
COPY static static/
COPY engine engine/
COPY score.py app.py ./
# Whatever the umask of the one who builds; owned by root, so the service cannot change them.
RUN python -m compileall -q . && chmod -R a+rX .

# By number: an orchestrator sees without a user database that it is not root.
USER 10001:10001
EXPOSE 5000
# The first check comes after one interval, so the interval bounds how soon the container can be called healthy.
HEALTHCHECK --interval=2s --timeout=2s \
    CMD ["python", "-IS", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=1)"]
# The first process of a container ignores SIGTERM until Python code handles it, about a second into the imports;
# SIGINT is handled from the interpreter's start.
STOPSIGNAL SIGINT
CMD ["python", "app.py"]
