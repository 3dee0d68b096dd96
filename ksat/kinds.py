"""Reading or knowledge: what a question asks for decides what helps it, so every breakdown tells the two apart.

A rule that needs no labels. docs/results.md has its error on labelled rows.
"""

import re
from typing import Literal

from ksat.questions import Question

Kind = Literal["reading", "knowledge"]

# Names of sources in the competition's files and in ours.
_SOURCES = {
    "reading": re.compile(r"klue|mrc|belebele|hellaswag|국어|독서|문학|화법|작문|문법|언어와 매체", re.IGNORECASE),
    "knowledge": re.compile(r"mmlu|사회|한국사|역사|지리|경제|정치|윤리|(?<![화문])법", re.IGNORECASE),
}
# The text is asked about itself ...
_ABOUT_THE_TEXT = re.compile(
    r"이어질|일치|알 수 (?:있|없)|답할 수 없|빈칸|들어갈 (?:말|내용|문장)|까닭|이유|지문|본문|글쓴이|필자|화자|주제|제목|요지|"
    r"중심 (?:내용|생각)|서술|전개|추론|바탕으로|이해한|표현|밑줄(?! 친 .?(?:이|그) )|문맥|의미|심정|태도"
)
# ... or about what it only points to: a time, a place, a person, an institution.
_POINTS_BEYOND = re.compile(
    r"(?:위|윗글|다음|이|그|밑줄 친|\(가\)|㉠)(?:의|과 같은)? ?'?(?:그|이)?'? ?(?:왕|국왕|왕조|나라|국가|시기|시대|인물|사건|운동|조약|단체|기구|제도|정책|"
    r"법|책|비석|지역|지형|기후|도시|사상가|학자|종교|전쟁|정부|문화재|문화유산|유물)(?![가-힣]{3})|당시|업적|유리해진|시기에|왕 때"
)
_IN_THE_STYLE_OF_READING = re.compile(r"적절|알맞|다음 (?:중|설명)|무엇|정확|어디|언제|누[가구]|얼마|몇|왜")
_IN_THE_STYLE_OF_KNOWLEDGE = re.compile(r"옳(?:은|지)|에 대한 설명으로|해당하는")
SHORT, LONG = 120, 150  # characters of passage and <보기>; a short text is more often a hint than something to read


def find_kind(question: Question) -> Kind:
    """What the question asks for: its source says it, else the cues in its wording together with its length.

    Args:
        question: `source` is looked at first, if its file has that column.
    """
    by_source: list[Kind] = [kind for kind in ("reading", "knowledge") if _SOURCES[kind].search(question.source)]
    if len(by_source) == 1:
        return by_source[0]
    text = question.question
    points = 2 * bool(_ABOUT_THE_TEXT.search(text)) - 2 * bool(_POINTS_BEYOND.search(text))
    points += bool(_IN_THE_STYLE_OF_READING.search(text)) - bool(_IN_THE_STYLE_OF_KNOWLEDGE.search(text))
    length = len(question.passage) + len(question.question_plus)
    points += (length >= LONG) - (length < SHORT)
    return "reading" if points >= 0 else "knowledge"
