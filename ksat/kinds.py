"""Reading or knowledge: what a question asks for decides what helps it, so every breakdown tells the two apart.

Who says so, the first that does: the user's file (`--kinds FILE`), the columns `kind` and `source`, the number of choices where it
tells the source of a file's rows, and a rule on the wording that needs no labels. docs/results.md has its error on labelled rows.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ksat.questions import Question

Kind = Literal["reading", "knowledge"]
KINDS: tuple[Kind, Kind] = ("reading", "knowledge")
WORDING = "wording"  # of --kinds: the number of choices is no hint
FEWEST = 100  # rows of four and of five choices, that their number may tell their source

# The entrance exam without a subject beside it: its rows in the competition's files are those of the Korean language.
_EXAM = r"^(?:[\W\d_]|학년도|년)*(?:kcsat|수능|대학수학능력시험)(?:[\W\d_]|형|문제|기출)*$"
# Names of sources in the competition's files and in ours.
_SOURCES = {
    "reading": re.compile(
        rf"{_EXAM}|klue|mrc|belebele|hellaswag|국어|독서|문학|화법|작문|문법|언어와 매체", re.IGNORECASE
    ),
    "knowledge": re.compile(r"mmlu|사회|한국사|역사|지리|경제|정치|윤리|(?<![화문])법", re.IGNORECASE),
}
# The text is asked about itself ...
_ABOUT_THE_TEXT = re.compile(
    r"이어질|일치|알 수 (?:있|없)|답할 수 없|빈칸|들어갈 (?:말|내용|문장)|까닭|이유|지문|본문|글쓴이|필자|화자|주제|제목|요지|논지|"
    r"중심 (?:내용|생각)|서술|전개|추론|미루어|바탕으로|근거할 때|에 따르면|이해|감상|표현|밑줄(?! 친 .?(?:이|그) )|문맥|의미|심정|태도"
)
# ... or about what it only points to: a time, a place, a person, an institution, a notion.
_POINTS_BEYOND = re.compile(
    r"(?:위|윗글|다음|이|그|밑줄 친|자료|\(가\)|㉠)(?:의|에 나타난|[과와] 같은|같은|러한|를|와 같이 주장한)? ?'?(?:그|이)?'? ?"
    r"(?:왕|국왕|왕조|임금|군주|황제|나라|국가|시기|시대|인물|가문|세력|단체|집단|기구|정당|정부|사건|운동|시위|조약|문서|선언|연설|발언|제도|정책|조치|개혁|"
    r"법|책|비석|지역|지형|기후|바람|도시|사상가|학자|사상|관점|종교|전쟁|문화재|문화유산|유물|원칙|법칙|이론|개념|현상|사례|절차|시장)(?![가-힣]{3})|"
    r"당시|업적|유리해진|시기에|왕 때|재위|역사적 배경|법적 판단|경제적 분석|용어|명칭|무엇이라|무엇의 예"
)
_IN_THE_STYLE_OF_READING = re.compile(r"적절|알맞|다음 (?:중|설명)|무엇|정확|어디|언제|누[가구]|얼마|몇|왜")
_IN_THE_STYLE_OF_KNOWLEDGE = re.compile(r"옳(?:은|지)|에 대한 설명으로|해당하는|가리키는|나타내는|설명하는 것")
# A question that has no content of its own: what it asks stands in the passage.
_ASKS_NOTHING = re.compile(
    r"(?:위|다음|이)?[^가-힣]*(?:중에?서?|가운데|글|문장|진술|설명|질문|빈칸)?.{0,6}"
    r"(?:옳은|맞는|알맞은|적절한|올바른|해당하는|정답|답|완성).{0,14}"
)
_CUT_OFF = re.compile(r"[?:…_]['\"”’)\]]*$|[^.!?'\"”’)\]다]$")  # how a passage ends that is half of a question
_QUOTED = re.compile(r"[\"“『「].*[\"”』」]", re.DOTALL)
# A document, which its author or year closes.
_ATTRIBUTED = re.compile(r"\s[-–—―] ?[^.\n]{2,80}$|\b1[0-9]{3}년?[)\]\"”]*\.?$")
_STATEMENTS = re.compile(r"[ㄱ-ㅎ](?:, ?[ㄱ-ㅎ])*")  # choices that only name the statements of a <보기>
SHORT, LONG = 120, 150  # characters of passage and <보기>; a short text is more often a hint than something to read


def find_kind(question: "Question") -> Kind:
    """What the question asks for: as told with it, else as the number of choices hints or the wording says."""
    if told := told_kind(question):
        return told
    if question.kind_hint and question.passage:
        return question.kind_hint
    return kind_by_wording(question)


def told_kind(question: "Question") -> Kind | None:
    """What its columns `kind` and `source` or the user's file say, None where they say nothing."""
    if question.kind:
        return question.kind
    by_source = [kind for kind in KINDS if _SOURCES[kind].search(question.source)]
    return by_source[0] if len(by_source) == 1 else None


def choices_tell_kinds(questions: "Sequence[Question]") -> bool:
    """Whether the number of choices tells the kind of a file's rows.

    In the competition's files it does: four choices have KMMLU and MMMLU, five the college entrance exam and KLUE. Asked for are a
    hundred rows of either number, and that what is told of them, else their wording, agrees: a tenth more of four choices is knowledge.
    """
    kinds: dict[int, list[Kind]] = {4: [], 5: []}
    for question in questions:
        if question.num_choices in kinds:
            kinds[question.num_choices].append(told_kind(question) or kind_by_wording(question))
    if min(map(len, kinds.values())) < FEWEST:
        return False
    of_four, of_five = (kinds[size].count("knowledge") / len(kinds[size]) for size in (4, 5))
    return of_four - of_five >= 0.1


def kind_by_choices(question: "Question") -> Kind | Literal[""]:
    """What the number of choices hints where choices_tell_kinds."""
    hints: dict[int, Kind] = {4: "knowledge", 5: "reading"}
    return hints.get(question.num_choices, "")


def kind_by_wording(question: "Question") -> Kind:
    """By the cues in the question's and the passage's wording, together with the passage's length."""
    if not question.passage:
        return "knowledge"  # there is nothing to read, or a <보기> alone
    text = question.question
    length = len(question.passage) + len(question.question_plus)
    points = 2 * bool(_ABOUT_THE_TEXT.search(text)) - 2 * bool(_POINTS_BEYOND.search(text))
    points += bool(_IN_THE_STYLE_OF_READING.search(text)) - bool(_IN_THE_STYLE_OF_KNOWLEDGE.search(text))
    points += (length >= LONG) - (length < SHORT)
    if length < SHORT:
        points -= 2 * bool(_CUT_OFF.search(question.passage)) + 2 * bool(_ASKS_NOTHING.fullmatch(text))
    document = _ATTRIBUTED.sub("", question.passage)
    points -= bool(_QUOTED.fullmatch(document)) + 2 * (document != question.passage)
    points -= all(_STATEMENTS.fullmatch(choice) for choice in question.choices)
    return "reading" if points >= 0 else "knowledge"
