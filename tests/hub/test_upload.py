import logging

import pytest
from hub_server import TOKEN, running_hub

from trl_diffusion_rank.data.artefact import push_dataset
from trl_diffusion_rank.hub import upload as module
from trl_diffusion_rank.hub.upload import check_login, check_repo_id, hub_id, upload


FOR_EVER = ...


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    with running_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [lora]\n---\n\n# x\n")
    (tmp_path / "weights.safetensors").write_bytes(bytes(range(256)) * 400)
    (tmp_path / "stage.json").write_text("{}")
    return tmp_path


def send(folder, repo_id="me/x", **kwargs):
    return upload(folder, repo_id, allow_patterns=["README.md", "*.safetensors"], **kwargs)


def test_what_is_asked_for_arrives(hub, folder):
    commit = send(folder, private=True, commit_message="First")
    assert str(commit.repo_url) == f"{hub.url}/me/x"
    repository = hub.repositories["me/x"]
    assert set(repository.files) == {"README.md", "weights.safetensors"}
    assert repository.files["weights.safetensors"] == (folder / "weights.safetensors").read_bytes()
    assert (repository.private, repository.commits) == (True, ["First"])


def test_what_has_arrived_is_not_sent_again(hub, folder):
    hub.faults["commit"] = [500, FOR_EVER]
    with pytest.raises(ValueError, match="the Hub has trouble of its own"):
        send(folder)
    assert hub.asked.count("put") == 1
    hub.faults.clear()
    send(folder)
    assert hub.asked.count("put") == 1
    send(folder)
    assert len(hub.repositories["me/x"].commits) == 1  # nothing has changed since


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        ({"commit": [409]}, {"commit": 2}),
        ({"commit": [412, 409]}, {"commit": 3}),
        ({"create": [500, 503]}, {"create": 3}),
        ({"put": [500, 500, 500]}, {"put": 4}),  # by the client itself
        ({"put": ["cut"]}, {"put": 2}),
        ({"commit": ["cut"]}, {"commit": 2}),
    ],
)
def test_what_may_pass_is_tried_again(hub, folder, faults, asked):
    hub.faults = faults
    send(folder)
    assert {route: hub.asked.count(route) for route in asked} == asked
    assert set(hub.repositories["me/x"].files) == {"README.md", "weights.safetensors"}


@pytest.mark.parametrize(
    ("faults", "message", "tries"),
    [
        ({"commit": [401]}, r"doesn't accept the login \(401\)\. Log in with `hf auth login`, or set HF_TOKEN", 1),
        (
            {"preupload": [403]},
            r"may not write there \(403\)\. Use a token .* organisation of yours in `hub_model_id`",
            1,
        ),
        ({"preupload": [404]}, r"no such repository, or it is hidden .* \(404\)\. Check `hub_model_id`", 1),
        ({"commit": [409, FOR_EVER]}, r"someone else is changing .* \(409\)\. Wait until they are done", 3),
        ({"commit": [502, FOR_EVER]}, r"the Hub has trouble of its own \(502\)\. Wait some minutes", 3),
        ({"commit": [429, FOR_EVER]}, r"too many requests from here \(429\)\. Wait some minutes", 1),
        ({"commit": [418]}, r"418 .*\. Check `hub_model_id`", 1),
        ({"put": ["cut", FOR_EVER]}, r"the connection to the Hub broke \(.*Error\)\. Check the connection", 18),
    ],
)
def test_what_does_not_pass_is_said_in_one_sentence(hub, folder, faults, message, tries, caplog):
    (route,) = faults
    hub.faults = faults
    with pytest.raises(
        ValueError, match=rf"The model in .* could not be pushed to 'me/x': .*{message}.*nothing is lost"
    ):
        send(folder)
    assert hub.asked.count(route) == tries
    assert TOKEN not in caplog.text


def test_somebody_elses_name(hub, folder):
    with pytest.raises(ValueError, match=r"pushed to 'you/x': this login may not write there \(403\)"):
        send(folder, "you/x")


def test_login_is_asked_for_before_anything_is_sent(hub, monkeypatch):
    assert check_login() == "me"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"Nothing was pushed: the Hub doesn't accept the login \(401\)") as error:
        check_login()
    assert "hf_other" not in str(error.value)
    monkeypatch.setattr(module, "get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"nobody is logged in to the Hub\. Log in with `hf auth login`"):
        check_login()


def test_a_token_in_an_answer_is_not_shown(hub, folder, monkeypatch, caplog):
    monkeypatch.setattr(module, "_cause", lambda error, option: (f"the server said {TOKEN}", "Do something"))
    hub.faults["commit"] = [401]
    with pytest.raises(ValueError, match=r"the server said \*\*\*\. Do something"):
        send(folder)


def test_logs_have_no_token(hub, folder, caplog):
    caplog.set_level(logging.DEBUG)
    hub.faults = {"put": [500, "cut"], "commit": [409]}
    send(folder)
    assert "commit" in caplog.text
    assert TOKEN not in caplog.text


def test_a_dataset_and_what_is_gone_from_it(hub, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("---\ntags: [a]\n---\n")
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"a" * 100)
    (tmp_path / "stage.json").write_text("{}")
    assert str(push_dataset(tmp_path, "me/lists")).startswith(f"{hub.url}/datasets/me/lists/commit/")
    (tmp_path / "data" / "train-00000-of-00001.parquet").rename(tmp_path / "data" / "train-00000-of-00002.parquet")
    push_dataset(tmp_path, "me/lists")
    assert set(hub.repositories["me/lists"].files) == {"README.md", "data/train-00000-of-00002.parquet"}
    hub.faults["preupload"] = [401]
    with pytest.raises(ValueError, match=r"The dataset in .* could not be pushed to 'me/lists': .*Log in with"):
        push_dataset(tmp_path, "me/lists")


def test_names():
    check_repo_id("hub_model_id", "me/x")
    with pytest.raises(ValueError, match=r"`hub_model_id` is 'me/my model', expected user/name: Repo id"):
        check_repo_id("hub_model_id", "me/my model")
    assert hub_id("me/x") == "me/x"
    for name in (None, "", "digits", "/tmp/a/b", "runs/mine/score", "me/my model"):
        assert hub_id(name) is None
