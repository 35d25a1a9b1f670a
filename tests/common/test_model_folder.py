"""A model that is nowhere is one line that names the knob."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from common import model_folder


def test_a_hub_name_that_is_not_found_names_the_knob(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*given: object, **options: object) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError\nAn error happened.")

    monkeypatch.setattr(model_folder, "snapshot_download", lookup)
    with pytest.raises(
        ValueError, match=r"^model=nobody/nothing: no such folder, and the hub .*\(Got: ConnectError\)$"
    ):
        model_folder.locate_model("nobody/nothing", ("vae",))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="^model=a b/c: no such folder, and the hub has no such model"):
        model_folder.locate_model("a b/c", ("vae",))
