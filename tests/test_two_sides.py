"""A config.json that cannot be, on either of two sides: told in a line, with the file that it is in."""

import json
import shutil

import pytest

import verify.__main__
from glm_dsa.errors import ConfigError
from reference.kept import TRAINED
from verify.engines.headers import headers_of
from verify.release.request import OnTrial

GOOD = str(TRAINED / "interleaved")
WRONG = {"missing": {}, "null": {"hidden_size": None}}


@pytest.fixture(params=WRONG)
def wrong(request, tmp_path):
    """(a folder, what is to be said of it)"""
    folder = shutil.copytree(GOOD, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config | WRONG[request.param]))
    return folder, f"{folder / 'config.json'}: hidden_size is {request.param}: expected a whole number"


@pytest.mark.parametrize(
    "command",
    [["drift", "{}", "--against", GOOD], ["drift", GOOD, "--against", "{}"], ["quality", "{}", "--against", GOOD],
     ["quality", GOOD, "--against", "{}"], ["audit", "{}/"]],
    ids=" ".join,
)  # fmt: skip
def test_commands_name_the_file(wrong, capsys, command):
    folder, message = wrong
    assert verify.__main__.main([part.format(folder) for part in command]) == 10
    assert capsys.readouterr().err == f"verify: {message}\n"


def test_the_gate_names_the_file(wrong):
    folder, message = wrong
    bad, good = headers_of(str(folder)), headers_of(GOOD)
    for headers, original in ((bad, None), (bad, good), (good, bad)):
        with pytest.raises(ConfigError) as told:
            OnTrial.of(headers, original=original)
        assert str(told.value) == message
