"""Web pages as text: listings and formulas kept, bombs and broken bytes refused by a reason."""

import time
from collections import Counter

import pytest

from glm_jax.data import sources, web

pytest.importorskip("resiliparse")

PAGE = r"""<html><head><title>t</title></head><body><nav>menu one two</nav><main><h1>Heading</h1>
<p>Some <b>text</b> with \(x^2\) and enough words to be the content of a page.</p>
<div class="highlight-python notranslate"><div class="highlight"><table class="highlighttable"><tr>
<td class="linenos"><div class="linenodiv"><pre>11
12</pre></div></td>
<td class="code"><div><pre><span class="k">def</span> f(x):
    return x &lt; 2
</pre></div></td></tr></table></div></div>
<pre><code class="language-js"><span class="line-number">7</span>let a =  1;
  let b;</code></pre><p>Inline <code>foo()</code> ends.</p>
<script type="math/tex; mode=display">\frac{a}{b}</script>
<p>After <math><semantics><mi>q</mi><annotation encoding="application/x-tex">x_1</annotation></semantics></math>.</p>
</main></body></html>"""


def test_listings_keep_language_and_indentation_and_lose_line_numbers():
    text = web.text(PAGE.encode())
    assert "```python\ndef f(x):\n    return x < 2\n```" in text
    assert "```js\nlet a =  1;\n  let b;\n```" in text
    assert "Inline foo() ends." in text
    assert not any(number in text for number in ("11", "12", "7let", "menu"))


def test_formulas_keep_their_latex():
    text = web.text(PAGE.encode())
    assert all(formula in text for formula in (r"\(x^2\)", r"\[\frac{a}{b}\]", r"\(x_1\)"))


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"<div>" * 200_000 + b"x", "nested"),
        (b"<div></b>" * 200_000 + b"x", "nested"),  # closing tags that close nothing
        (b"<p " + b"a" * 3_000_000 + b">x</p>", "huge tag"),
        (b"<p>" + b"x" * web.MOST_BYTES, "too large"),
        (b"<p>\x00</p>", "binary"),
        (b"<meta charset=utf-8><p>a</p>" + b"\x81\xfe\xff\xc3" * 400, "encoding"),
    ],
)
def test_bombs_and_broken_bytes_are_refused_at_once(page, reason):
    begun = time.process_time()
    with pytest.raises(web.Unusable, match=reason):
        web.text(page)
    assert time.process_time() - begun < 2


def test_time_grows_with_the_page_and_not_with_its_square():
    begun = time.process_time()
    text = web.text(b"<main>" + b"<p>words between</p><pre>x = 1</pre>" * 4000 + b"</main>")
    assert text.count("x = 1") == 4000
    assert time.process_time() - begun < 2  # 0.3 s; with a step that makes a list of all listings, 20 s


def test_a_page_says_its_encoding():
    page = '<meta charset="gb2312"><p>这是一个中文网页，有足够的文字可以阅读。</p>'
    assert "中文网页" in web.text(page.encode("gb2312"))


def test_pages_of_a_folder_become_documents_and_bad_ones_reasons(tmp_path):
    root = tmp_path / "site"
    root.mkdir()
    (root / "a.html").write_text(PAGE)
    (root / "b.htm").write_bytes(b"<div>" * 9000)
    documents = list(sources.folder(root, 10**6, drops := Counter()))
    assert [(d.path, d.domain) for d in documents] == [("site/a.html", "math")]
    assert drops == {"page nested too deeply": 1}
