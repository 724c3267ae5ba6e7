"""MLflow's registry of the operator: each model that was trained on what came back, with its figures.

It lies in the state's folder, apart from the experiments of train.ipynb.
"""

from pathlib import Path
from typing import Any

from engine.saved import load_model
from operations import store

NAME = "sms-spam-filter"
SERVING = "serving"  # alias of the version that serves


def _connect() -> Any:
    """Return the module mlflow, with the registry of the state's folder as its own."""
    import mlflow  # here, because it takes seconds, which most jobs need not spend

    mlflow.set_tracking_uri(f"sqlite:///{store.STATE / 'mlflow.db'}")
    return mlflow


def add_version(path: Path, card: dict[str, Any], parameters: dict[str, Any]) -> int:
    """Add a saved model to the registry, with the figures of its card, and return its version.

    Args:
        path: its joblib file.
        card: of the model.
        parameters: what else it was made with.
    """
    mlflow = _connect()
    client = mlflow.MlflowClient()
    if not client.get_experiment_by_name(NAME):
        client.create_experiment(NAME, artifact_location=(store.STATE / "mlruns").as_uri())
    with mlflow.start_run(experiment_id=client.get_experiment_by_name(NAME).experiment_id):
        mlflow.log_params({**card["parameters"], "sha256": card["sha256"], **parameters})
        mlflow.log_params({f"md5 of {file}": md5 for file, md5 in card["data"].items()})
        for source, figures in card["metrics"]["test"].items():
            mlflow.log_metrics({f"test_{name}_{source}": value for name, value in figures.items()})
        info = mlflow.sklearn.log_model(
            load_model(path),
            name="model",
            serialization_format="cloudpickle",
            pip_requirements=[f"-r {store.ROOT / 'requirements.txt'}"],
            code_paths=[str(store.ROOT / "engine")],
            pyfunc_predict_fn="predict_proba",
            registered_model_name=NAME,
        )
    return int(info.registered_model_version)


def mark_serving(version: int | None) -> None:
    """Say in the registry which version serves; None stands for a model that is not in it."""
    if not (store.STATE / "mlflow.db").exists():
        return
    client = _connect().MlflowClient()
    if version is None:
        client.delete_registered_model_alias(NAME, SERVING)
    else:
        client.set_registered_model_alias(NAME, SERVING, version)
