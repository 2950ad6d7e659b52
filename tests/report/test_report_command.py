"""``kd-lightning-report``, and a pipeline whose report cannot be written."""

import json
from pathlib import Path

import pytest

from kd_lightning.report.report_command import main
from tests.command import TINY, copied, kd_lightning
from tests.report.records import record, several


def write(folder: Path, content) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(content))
    return folder


def test_the_page_is_made_again_from_the_record_alone(tmp_path: Path, capsys) -> None:
    folder = write(tmp_path / "pipeline-a", record(name="again"))
    main([str(folder)])
    assert capsys.readouterr().out.split() == [str(folder / "report.html")]
    assert "<title>again</title>" in (folder / "report.html").read_text()


def test_a_folder_of_several_pipelines_is_one_page_more(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, content in enumerate(several()):
        write(tmp_path / f"stages/pipeline-{i}", content)
    main(["stages", "--output", "both.html"])
    assert len(capsys.readouterr().out.split()) == 3
    assert "2 pipelines side by side" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no report.json in"), ("{", "is torn"), ('{"version": 99}', "has version 99, expected 1")],
)
def test_what_is_no_record_is_named_with_what_to_do(tmp_path: Path, content, said) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(SystemExit, match=rf"kd-lightning-report: .*{said}.*: run "):
        main([str(tmp_path)])


@pytest.mark.integration
def test_a_report_that_cannot_be_written_fails_no_pipeline(finished, tmp_path: Path) -> None:
    folder = copied(finished[0], tmp_path)
    (there,) = folder.glob("mlruns/stages/pipeline-*/report.json")
    there.unlink()
    there.mkdir()  # nothing can be renamed to it
    printed = kd_lightning(*TINY, cwd=folder, KD_RAISE_ERRORS_OF_REPORT="0")
    assert "no report was written, IsADirectoryError" in " ".join(printed.split())
    assert "Report:" not in printed
    assert json.loads(there.with_name("verdict.json").read_text())["models"]
