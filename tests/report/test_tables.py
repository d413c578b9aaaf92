from trl_diffusion_rank.report.tables import Table, read_markdown


def test_headings_texts_and_tables():
    text = (
        "## Held-out\n\nOn 93 rows.\nTwice.\n\n| a   |  b |\n|-----|---:|\n| x \\| y |  1 |\n| z   |    |\n\n## Next\n"
    )
    assert list(read_markdown(text)) == [
        ("heading", "Held-out"),
        ("text", "On 93 rows."),
        ("text", "Twice."),
        ("table", Table(["a", "b"], [False, True], [["x | y", "1"], ["z", ""]])),
        ("heading", "Next"),
    ]
