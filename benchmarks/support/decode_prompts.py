"""Twenty prompts for benchmarks of decoding, five a kind: what people ask for, from open to nearly copied.

Written for this benchmark. Speculation depends on how foreseeable an answer is, so figures are given for each kind.
"""

from __future__ import annotations

_CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""
_STORY = (
    "The old harbour master counts the boats every evening. Last night he counted eleven, although only ten had left "
    "in the morning. He wrote the number down, lit his pipe, and waited for somebody to knock."
)
_LETTER = (
    "hello mr. brown, i am writing becuase the washing machine i bought from you on monday does not work. it makes a "
    "loud noise and then it stop. please send somebody to repair it or give me my money back. thank you, anna white"
)
_TABLE = (
    "name: The Blue Door\ntype: restaurant\nfood: Italian\nprice: moderate\ncustomer rating: 4 out of 5\n"
    "area: riverside\nfamily friendly: yes\nnear: The Grand Hotel"
)

PROMPTS = {
    "chat": (
        "Explain in a few sentences why the sky is blue.",
        "What should I think about before I adopt a dog?",
        "Give me three ideas for a birthday party in the rain.",
        "What is the difference between weather and climate?",
        "Write a short poem about a train that is always late.",
    ),
    "code": (
        "Write a Python function that returns the n-th Fibonacci number.",
        "Write a Python class Stack with the methods push, pop and is_empty.",
        "Write an SQL query that lists the ten customers with the highest total of orders.",
        f"Write tests with assert for this function:\n{_CODE}",
        "Write a function in JavaScript that reverses the words of a sentence.",
    ),
    "rewriting": (
        f"Repeat this text word for word:\n{_STORY}",
        f"Correct the spelling and grammar of this letter, and change nothing else:\n{_LETTER}",
        f"Rename the variable `total` to `result` in this code, and return all of the code:\n{_CODE}",
        f"Rewrite this text in the present tense, keeping as many words as possible:\n{_STORY}",
        f"Add a docstring to this function and return the whole function:\n{_CODE}",
    ),
    "data to text": (
        f"Write one paragraph about this restaurant, using all of the facts:\n{_TABLE}",
        "Describe in sentences: Alan Turing | born | 1912; Alan Turing | field | computer science; "
        "Alan Turing | worked at | Bletchley Park; Bletchley Park | country | England",
        "Turn this into a weather report: Monday 12 degrees rain; Tuesday 15 degrees clouds; Wednesday 19 degrees sun; "
        "Thursday 21 degrees sun; Friday 14 degrees rain",
        "Turn this table into a list with one sentence for each row:\nplanet,moons,days in a year\nEarth,1,365\n"
        "Mars,2,687\nJupiter,95,4333\nSaturn,146,10759",
        "Write a match report from: home: Northfield; away: Eastvale; score: 3-1; goals: Reed 12, Okafor 40, "
        "Reed 77 (Northfield), Lund 85 (Eastvale); spectators: 4200",
    ),
}
