"""`hinge check RUN`: are the files of a run what its stages wrote?"""


def test_a_run_is_compared_with_its_checksums(copied_tiny_run, call_cli):
    folder = copied_tiny_run.folder
    done = call_cli("check", folder)
    assert done.code == 0 and "files are as they were written, 0 were changed" in done.out
    panel = folder / "panel.json"
    panel.write_text(panel.read_text() + "\n")
    done = call_cli("check", folder)
    assert done.code == 2 and f"error: {panel} was changed or damaged after hinge train wrote it" in done.out
    for command in ("report", "sample"):
        done = call_cli(command, folder)
        assert done.code == 2 and f"hinge check {folder} --accept" in done.err
    assert call_cli("check", folder, "--accept").code == 0
    assert call_cli("check", folder).code == 0
    assert call_cli("sample", folder).code == 0


def test_accepting_needs_a_run(tmp_path, call_cli):
    done = call_cli("check", tmp_path, "--accept")
    assert done.code == 2 and "folder of a run" in done.err
