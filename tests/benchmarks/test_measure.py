from benchmarks import measure


def test_a_section_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "doc.md"
    measure.write_section(path, "# Second", "    two\n")
    assert path.read_text() == "# Second\n\n    two\n"
    path.write_text("# First\n\none\n\n# Second\n\nold\n\n## Part\n\nold\n\n# Third\n\nthree\n")
    measure.write_section(path, "# Second", "new\n\n## Part\n\nnew\n")
    assert path.read_text() == (
        "# First\n\none\n\n# Second\n\nnew\n\n## Part\n\nnew\n\n# Third\n\nthree\n"
    )
    measure.write_section(path, "## Part", "newer")
    assert "## Part\n\nnewer\n\n# Third" in path.read_text()
    measure.write_section(path, "# Fourth", "four")
    assert path.read_text().endswith("three\n\n# Fourth\n\nfour\n")


def test_a_table():
    assert measure.table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
