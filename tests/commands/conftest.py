"""A short run for the tests of the commands."""

from pathlib import Path

import pytest

from tests.stage2_distill import training_helpers


@pytest.fixture(scope="session")
def student_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one iteration, 9 frames of 64 x 64."""
    folder = tmp_path_factory.mktemp("student")
    training_helpers.make_shards(folder / "data", model, records=8)
    run = training_helpers.make_config(
        folder / "data", model, folder / "run", iterations=1, student_update_interval=1, global_batch=2
    )
    training_helpers.run_here(run)
    return folder / "run"
