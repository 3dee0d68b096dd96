"""Reading or knowledge: what a question asks for decides what helps it, so every breakdown tells the two apart.

A rule that needs no labels. docs/results.md has its error on labelled rows.
"""

import re
from typing import Literal

from ksat.questions import Question

Kind = Literal["reading", "knowledge"]

# Names of sources in the competition's files and in ours.
_SOURCES = {
    "reading": re.compile(r"klue|mrc|belebele|hellaswag|국어|독서|문학", re.IGNORECASE),
    "knowledge": re.compile(r"mmlu|사회|한국사|역사|지리|경제|정치|윤리|법", re.IGNORECASE),
}
# Asked of the text itself ...
_READING_CUES = re.compile(
    r"이어질|일치|알 수 (있|없)|답할 수 없|답을 찾을|빈칸|들어갈 (말|내용|문장)|까닭|이유|지문|본문|글쓴이|필자|화자|주제|제목|요지|"
    r"중심 (내용|생각)|서술|전개|추론|바탕으로|이해한|표현|밑줄|문맥|의미|심정|태도|적절"
)
# ... or of what the text only points to.
_KNOWLEDGE_CUES = re.compile(
    r"(위|다음|이|그|밑줄 친|\(가\)|㉠)(의|과 같은)? ?(왕|국왕|나라|국가|시기|시대|인물|사건|운동|조약|단체|기구|제도|정책|법|책|비석|지역|기후|"
    r"도시|사상가|학자|종교|전쟁|정부|문화재|유물)|당시|에 대한 설명|설명으로|업적|사상가|옳(은|지)|해당하는|시기|정책|조약"
)
SHORT = 150  # characters of passage and <보기>: below, a text without cues is a hint rather than something to read


def find_kind(question: Question) -> Kind:
    """What the question asks for: its source says it, else the cues in its wording, else its length.

    Args:
        question: `source` is looked at first, if its file has that column.
    """
    by_source: list[Kind] = [kind for kind in ("reading", "knowledge") if _SOURCES[kind].search(question.source)]
    if len(by_source) == 1:
        return by_source[0]
    reading = len(_READING_CUES.findall(question.question))
    knowledge = len(_KNOWLEDGE_CUES.findall(question.question))
    if reading != knowledge:
        return "reading" if reading > knowledge else "knowledge"
    return "knowledge" if len(question.passage) + len(question.question_plus) < SHORT else "reading"
