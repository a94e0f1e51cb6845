"""The page of the configuration shows what `hinge config` prints."""

from helpers import ROOT


def test_the_page_shows_every_key(call_cli):
    printed = call_cli("config").out.strip()
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    assert f"```yaml\n{printed}\n```" in page, "write the output of `hinge config` into docs/reference/configuration.md"
