"""Corpora: what is read from JSON lines and from MediaWiki dumps, and how it is cut."""

import bz2
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksat.corpus import LONGEST, Article, cut_passages, read_corpus
from ksat.errors import InputError
from ksat.wikitext import to_plain_text

PAGE = """{{인물 정보
| 이름 = {{lang|ko|장영실}}
}}
[[파일:물시계.jpg|섬네일|[[경복궁]]의 물시계]]
'''장영실'''({{llang|zh|蔣英實}}, ?~?)은 [[조선]]의 ''[[과학자|과학 기술자]]''이다.<ref name="a">어느 책, {{쪽|3}}</ref><!-- 나이? -->
== 생애 ==
* [[동래현]]의 관노였다.<ref name="a" />
{| class="wikitable"
! 해 !! 일
|-
| 1434 || {{색|자격루}}
|}
그는 [http://example.org 물시계]를&nbsp;만들었다. 1 < 2<br />이다.
__목차__
== 같이 보기 ==
* [[이순지]]
[[분류:과학자]]
[[en:Jang Yeong-sil]]
"""
DUMP = f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="ko">
<siteinfo><sitename>위키</sitename></siteinfo>
<page><title>장영실</title><ns>0</ns><id>1</id><revision><text xml:space="preserve">{
    PAGE.replace("&", "&amp;").replace("<", "&lt;")
}</text></revision></page>
<page><title>틀:색</title><ns>10</ns><revision><text>틀의 글</text></revision></page>
<page><title>물시계</title><ns>0</ns><redirect title="자격루"/><revision><text>#넘겨주기 [[자격루]]</text></revision></page>
<page><title>해시계</title><ns>0</ns><revision><text>#REDIRECT [[앙부일구]]</text></revision></page>
<page><title>빈 글</title><ns>0</ns><revision><text /></revision></page>
<page><title>측우기</title><ns>0</ns><revision><text>비가 온 양을 잰다.</text></revision></page>
</mediawiki>"""
JANG = "장영실은 조선의 과학 기술자이다.\n동래현의 관노였다.\n그는 물시계를 만들었다. 1 < 2이다."


def read(path: Path) -> list[Article]:
    return list(read_corpus(path))


def test_markup_is_reduced_to_its_prose() -> None:
    assert to_plain_text(PAGE) == JANG


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("가 {{틀|{{안|{{더 안}}}}}} 나", "가 나"),
        ("{| 겉\n|\n{| 속\n|}\n|}\n뒤", "뒤"),
        ("닫히지 않은 {{틀 뒤", "닫히지 않은 {{틀 뒤"),
        ("[[서울특별시#역사|서울]]과 [[부산광역시#역사]]", "서울과 부산광역시"),
        ("<ref>하나</ref>앞<ref name=b/>뒤<REF>둘</REF>", "앞뒤"),
        ("<math>x^2</math>는 <sup>제곱</sup>", "는 제곱"),
        ("둘 <!-- 끝이 없는 풀이", "둘"),
        ("== 각주 ==\n{{각주}}\n남지 않는 글", ""),
        ("== 각주를 다는 법 ==\n남는 글", "남는 글"),
        ("[[:분류:역사]]와 [[file:a.png|thumb]]", "분류:역사와"),
        ("&lt;b&gt; &amp;", "<b> &"),
        ("세종({{한자|世宗}}, 1397년~1450년)", "세종(1397년~1450년)"),
    ],
)
def test_pieces_of_markup(markup: str, text: str) -> None:
    assert to_plain_text(markup) == text


@given(st.text(alphabet="가나 \n[]{}|<>/ref='!-:=*", max_size=60))
def test_any_markup_comes_to_an_end_and_gains_nothing(markup: str) -> None:
    assert len(to_plain_text(markup)) <= len(markup)


@pytest.mark.parametrize("name", ["dump.xml", "dump.xml.bz2"])
def test_a_dump_gives_the_articles_of_the_main_namespace(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bz2.compress(DUMP.encode()) if name.endswith("bz2") else DUMP.encode())
    assert read(path) == [Article("장영실", JANG), Article("측우기", "비가 온 양을 잰다.")]


@pytest.mark.parametrize("name", ["wiki.jsonl", "wiki_00", "wiki.jsonl.bz2"])
def test_json_lines_give_title_and_text(tmp_path: Path, name: str) -> None:
    lines = [
        '{"id": "1", "url": "u", "title": "가", "text": "하나.\\n둘."}',
        "",
        '{"text": "제목 없음"}',
        '{"text": " "}',
    ]
    decomposed = json.dumps({"title": "한글", "text": "\u1112\u1161\u11ab\0 \ud800"})
    text = "\ufeff" + "\n".join([*lines, decomposed])
    path = tmp_path / name
    path.write_bytes(bz2.compress(text.encode()) if name.endswith("bz2") else text.encode())
    assert read(path) == [Article("가", "하나.\n둘."), Article("", "제목 없음"), Article("한글", "한 \ufffd")]


BAD = {
    "none.jsonl": (None, "no such file"),
    "empty.jsonl": (b"", r"no text in it; expected JSON lines such as"),
    "blank.jsonl": (b'{"text": ""}\n', "no text in it"),
    "field.jsonl": (
        b'{"text": "a"}\n{"title": "b", "body": "c"}',
        r"line 2 has no text in a field 'text' \(fields 'title', 'body'\)",
    ),
    "number.jsonl": (b'{"text": 3}', "line 1 has no text in a field 'text'"),
    "list.jsonl": (b'["text"]', r"line 1 has no text in a field 'text' \(list\)"),
    "cut.jsonl": (b'{"text": "a"}\n{"te', "line 2 is not JSON"),
    "latin.jsonl": ('{"text": "가"}'.encode("cp949"), r"not UTF-8 \(byte 0xb0\)"),
    "cut.xml": (DUMP.encode()[:1300], "cut, or not XML"),
    "empty.xml": (b"", "cut, or not XML"),
    "none.xml": (b"<mediawiki></mediawiki>", "no text in it; expected a MediaWiki dump"),
    "cut.xml.bz2": (bz2.compress(DUMP.encode())[:-20], "ends in the middle of its bz2 stream"),
    "plain.xml.bz2": (DUMP.encode(), r"can't be read \(Invalid data stream\); copy or download it again"),
    "deep.jsonl": (b"[" * 100_000, r"line 1 is not JSON \(nested too deeply\)"),
    "digits.jsonl": (b'{"text": "a", "id": ' + b"9" * 5000 + b"}", r"line 1 is not JSON \(Exceeds the limit"),
    "euc.xml": (
        "<?xml version='1.0' encoding='euc-kr'?><mediawiki>가</mediawiki>".encode("euc-kr"),
        r"its XML declares an encoding that can't be read \(multi-byte encodings are not supported\); save it as UTF-8",
    ),
    "unknown.xml": (
        b"<?xml version='1.0' encoding='klingon'?><mediawiki/>",
        r"declares an encoding that can't be read \(unknown encoding: klingon\)",
    ),
    "wrong.xml": ("<?xml version='1.0' encoding='utf-8'?><a>가</a>".encode("cp949"), "cut, or not XML"),
    "n" * 300: (None, r"can't be read \(File name too long\); check the path and its rights"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_corpora_are_refused_by_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"--corpus {tmp_path / name}: ")


def test_a_folder_and_a_nul_for_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=f"--corpus {tmp_path}: a folder where a file is expected; name the file in it"
    ):
        read(tmp_path)
    with pytest.raises(InputError, match="has a NUL in its name"):
        read(tmp_path / "a\0b")


def test_long_articles_are_cut_between_sentences_into_like_lengths() -> None:
    sentences = [f"이것은 {i}번째 문장이며 다른 문장과 길이가 비슷하다." for i in range(60)]
    passages = cut_passages(Article("제목", " ".join(sentences)))
    assert " ".join(passage.text for passage in passages) == " ".join(sentences)
    assert {passage.title for passage in passages} == {"제목"}
    lengths = [len(passage.text) for passage in passages]
    assert max(lengths) <= LONGEST
    assert min(lengths) >= 300


@given(st.lists(st.tuples(st.integers(1, 900), st.sampled_from([". ", "\n", "\n\n", "다 ", "”) ", "! "])), max_size=12))
def test_cutting_loses_nothing_but_blanks(parts: list[tuple[int, str]]) -> None:
    text = "".join("가" * length + end for length, end in parts)
    passages = [passage.text for passage in cut_passages(Article("", text))] if text.strip() else []
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(0 < len(passage) <= LONGEST for passage in passages)
