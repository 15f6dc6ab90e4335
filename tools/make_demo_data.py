"""Writes ``configs/demo-train.jsonl`` and ``configs/demo-validation.jsonl``, the rows of ``kvopt demo``: reminders in
several phrasings, each with its JSON.

    python tools/make_demo_data.py

The words below are ours; rows are drawn from them with a fixed seed, so the same file comes out every time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

ROWS = {"train": 72, "validation": 16}
SEED = 20
TASKS = """
call the dentist; water the plants; pay the rent; pick up the parcel; buy milk; feed the cat; send the invoice
book a table; take the pills; pack the suitcase; meet Anna; return the books; wash the car; renew the passport
walk the dog; check the oven; clean the kitchen; visit grandma; charge the phone; print the tickets; call mum
write the report; order pizza; fix the bike; take out the trash; sign the contract; change the filter; buy flowers
cancel the gym; iron the shirts; update the website; back up the laptop; bake a cake; mow the lawn; email Mr Lopez
join the team meeting; submit the expenses; collect the keys; pay the electricity bill; practise the piano
"""
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TIMES = ("7 am", "8:30", "noon", "3 pm", "18:00", "10:15", "6 am", "5 pm", "11 am", "20:30", "9 pm", "14:45", "1 pm")
PHRASINGS = (
    "Remind me to {task} on {day} at {time}.",
    "On {day} at {time} I have to {task}.",
    "I need to {task} on {day} at {time}.",
    "{day}, {time}: {task}.",
    "At {time} on {day}, {task}.",
    "I must not forget to {task} on {day} at {time}.",
    "Can you remind me to {task} at {time} on {day}?",
    "Set a reminder for {day} at {time}: {task}.",
)


def rows() -> list[dict[str, str]]:
    """Different messages, each with the JSON object that is asked for."""
    tasks = [task.strip() for line in TASKS.strip().splitlines() for task in line.split(";")]
    draw, answers = random.Random(SEED), {}
    while len(answers) < sum(ROWS.values()):
        task, day, time, phrasing = (draw.choice(words) for words in (tasks, DAYS, TIMES, PHRASINGS))
        message = phrasing.format(task=task, day=day, time=time)
        answers[message[0].upper() + message[1:]] = json.dumps({"task": task, "day": day, "time": time})
    return [{"message": message, "reminder": answer} for message, answer in answers.items()]


if __name__ == "__main__":
    left = rows()
    for split, count in ROWS.items():
        path = Path(__file__).resolve().parents[1] / "configs" / f"demo-{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in left[:count]), "utf-8", newline="\n")
        left = left[count:]
