from glm_jax.data import commits

CHANGELOG = """\
tool (1.2-3) unstable; urgency=medium

  * Do not read beyond the end of a
    short header. (Closes: #900123)
  * New patch fix-locale-names: names of locales are compared without case.

 -- A Maintainer <a@example.org>  Mon, 01 Jan 2024 00:00:00 +0000

tool (1.2-2) unstable; urgency=low

  * Standards-Version 4.6.

 -- A Maintainer <a@example.org>  Sun, 01 Jan 2023 00:00:00 +0000
"""
DIFF = "--- a/{0}.c\n+++ b/{0}.c\n@@ -1 +1 @@\n-int {0};\n+long {0};\n"


def _patch(message, name):
    return f"{message}\n{DIFF.format(name)}"


def test_changes_of_one_bug_stand_in_one_text_behind_what_was_said_about_it():
    patches = {
        "debian/patches/b-second.patch": _patch(
            "Description: the test for the header\nBug-Debian: https://bugs.debian.org/900123", "y"
        ),
        "debian/patches/a-header.patch": _patch("Description: check the header's length\nBug: #900123", "x"),
        "debian/patches/fix-locale-names.patch": _patch("", "z"),
        "debian/patches/silent.patch": _patch("x", "w"),
        "debian/patches/notes.txt": "no patch at all, but a note of some length about the others",
    }
    (first, text), (second, other) = commits.contexts(patches, CHANGELOG)
    assert first == ["debian/patches/a-header.patch", "debian/patches/b-second.patch"]
    assert text.startswith("Bugs: #900123\n\nChangelog:\n* tool (1.2-3): Do not read beyond the end of a short header.")
    assert (
        text.index("check the header's length")
        < text.index("+long x;")
        < text.index("the test for")
        < text.index("+long y;")
    )
    assert second == ["debian/patches/fix-locale-names.patch"]
    assert other.startswith("Changelog:\n* tool (1.2-3): New patch fix-locale-names") and other.endswith("+long z;\n")
    assert "Standards" not in text + other


def test_a_number_that_many_changes_share_is_no_bug_of_theirs():
    patches = {
        f"p{i:02}.patch": _patch(f"Description: change number {i} of the port to #123456", f"v{i}") for i in range(20)
    }
    assert [names for names, _ in commits.contexts(patches, "")] == [[name] for name in sorted(patches)]


def test_bugs_are_numbers_behind_a_sign_or_an_address_and_cves():
    text = "See #12345, https://bugs.debian.org/cgi-bin/bugreport.cgi?bug=777777 and CVE-2020-1234; not #12 or page/#55555."
    assert commits.bugs_in(text) == {"#12345", "#777777", "CVE-2020-1234"}
