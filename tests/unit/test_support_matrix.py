"""docs/parallelism.md says what the equivalence suite tests."""

from support_matrix import PAGE, matrix, replace


def test_the_page_has_the_matrix_of_the_suite():
    page = PAGE.read_text("utf-8")
    assert replace(page, matrix()) == page, "run `python tests/lib/support_matrix.py`"
