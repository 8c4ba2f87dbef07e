import json

from megactx.data.renderings import interface, listing, prose, tables, topics

MODULE = '''"""A module.

About things.
"""
import nowhere_to_be_found

LIMIT: int = 3

class Box(list):
    """A box."""

    def put(self, thing: str, *, times=2) -> None:
        """Put it in.

        Many times.
        """

add_docstr(Box.take, r"""take(n) -> thing

Takes one.
""")
'''


def test_prose_puts_docstrings_under_their_qualified_names_without_importing():
    assert prose(MODULE, "pkg.m") == (
        "# pkg.m\n\nA module.\n\nAbout things.\n\n## pkg.m.Box\n\nA box.\n\n## pkg.m.Box.put\n\nPut it in.\n\n"
        "Many times.\n\n## Box.take\n\ntake(n) -> thing\n\nTakes one."
    )


def test_an_interface_is_json_with_types_and_defaults():
    members = json.loads(interface(MODULE, "pkg.m"))["members"]
    assert members[0] == {"name": "LIMIT", "type": "int", "default": 3}
    assert members[1]["members"][0] == {
        "function": "put",
        "parameters": [{"name": "thing", "type": "str"}, {"name": "times", "default": 2}],
        "returns": "None",
    }


def test_a_module_that_does_not_parse_or_says_nothing_gives_nothing():
    assert prose("print 'two'", "m") == interface("print 'two'", "m") == prose("x = 1", "m") == ""


def test_topics_come_sorted_under_their_keys():
    assert topics("topics = {'b': 'two\\n', 'a': 'one\\n'}") == ["# a\n\none", "# b\n\ntwo"]


def test_a_listing_holds_paths_and_sizes_without_hashes():
    assert listing("b.py,sha256=x,2\na.py,sha256=y,1\nc.so,sha256=z,3\n") == "path,bytes\na.py,1\nb.py,2\n"


def test_tables_hold_the_unicode_names():
    found = dict(tables())
    assert "0041,LATIN CAPITAL LETTER A,Lu,L,," in found["unicodedata/00000.csv"].splitlines()
    assert json.loads(found["opcode.json"])["LOAD_CONST"]
