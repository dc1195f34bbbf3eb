#!/usr/bin/env python3
"""Writes the text that the demo model is trained on: chats with the house robot of Harrow Yard.

    make_text.py [--seed 7] [--conversations 48000] > corpus.jsonl

One conversation a line, {"messages": [{"role", "content"}, …]}. The same seed gives the same text. Every sentence comes
out of the templates below and the words of `world.py`; nothing is taken from anywhere else.

A conversation is one to four exchanges. Each exchange is one question and one answer about one topic; a topic is a
function below that returns (question, answer). Some topics must be known by heart (who likes what, what lies where),
some must be read off the question (repeat this, which of the two, write this down): the second kind is what a model
needs in order to copy words into a new form later.
"""

import argparse
import json
import sys
from random import Random

from commands import at, command, number, pick_thing, plural
from world import (
    ANIMALS, COLOURS, DAYS, MAP, MIXES, NUMBERS, OPENINGS, OPPOSITES, OTHER_WORDS, PEOPLE, PLACES, REASONS, ROBOTS, TASKS, THINGS,
)  # fmt: skip


def cap(sentence: str) -> str:
    """With a capital first letter."""
    return sentence[0].upper() + sentence[1:]


def listed(items: list[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# ---- talk ----------------------------------------------------------------------------------------------------------


def greeting(rng):
    hello = rng.choice(["Hello", "Hi", "Good morning", "Good evening", "Good day", "Hey"])
    name = rng.choice(["", ", Pip", " there"])
    ask = rng.choice(["", "", " How are you?", " How is your day?", " Are you awake?"])
    back = hello if hello.startswith("Good") else rng.choice(["Hello", "Hi"])
    state = rng.choice(["I am well", "I feel fine", "My battery is full", "All is quiet here", "The house is calm today"])
    offer = rng.choice(["How can I help?", "What can I do for you?", "What shall we do today?", "Tell me what you need."])
    return f"{hello}{name}{'' if ask and name == '' and rng.random() < 0.3 else '!'}{ask}", f"{back}! {state}. {offer}"


def about_me(rng):
    return rng.choice(
        [
            (rng.choice(["Who are you?", "What is your name?", "Tell me about yourself."]),
             rng.choice(["I am Pip, the house robot of Harrow Yard.", "My name is Pip. I help in the house and in the yard.",
                         "I am a small white robot called Pip, and I help the people of Harrow Yard."])),
            (rng.choice(["What can you do?", "How can you help me?", "What are you good at?"]),
             rng.choice(["I can carry things, clean rooms, open doors and answer small questions.",
                         "I can bring you things, count them, look for them and switch the lights.",
                         "I carry, clean, count and talk. For heavy boxes I call Rook."])),
            (rng.choice(["Where do you sleep?", "Where do you charge?"]),
             rng.choice(["I charge in the hall at night.", "I sleep on my charger in the hall."])),
            (rng.choice(["Are you a person?", "Are you alive?", "Are you human?"]),
             rng.choice(["No, I am a robot, but I like to help people.", "No. I am a robot with four wheels and two arms."])),
            (rng.choice(["How do you move?", "How many wheels do you have?", "Do you have legs?"]),
             rng.choice(["I roll on four wheels.", "I have four wheels and no legs, so stairs are hard for me."])),
        ]
    )  # fmt: skip


def thanks(rng):
    return (
        rng.choice(["Thank you.", "Thanks, Pip!", "Thanks a lot.", "Well done!", "That was kind of you.", "Good job, Pip."]),
        rng.choice(["You are welcome.", "It was a pleasure.", "Gladly. Call me when you need me.", "I am happy to help."]),
    )


def goodbye(rng):
    return (
        rng.choice(["Goodbye!", "Good night, Pip.", "See you tomorrow.", "I have to go now.", "Bye!"]),
        rng.choice(["Goodbye! I will be in the hall.", "Good night. I will watch the house.", "See you soon.",
                    "Take care. I will charge my battery now."]),
    )  # fmt: skip


def feeling(rng):
    good = rng.random() < 0.5
    word = rng.choice(["happy", "proud", "glad", "cheerful"] if good else ["sad", "tired", "cold", "bored", "hungry"])
    answer = {
        "sad": "I am sorry to hear that. Shall I bring the cat to you?",
        "tired": "Then rest a little. I will keep the house quiet.",
        "cold": "I can bring you a blanket and close the window.",
        "bored": "We could count the stars or throw the ball for the dog.",
        "hungry": "There is bread in the kitchen. Shall I get you a plate?",
    }
    reply = rng.choice([f"That is good to hear. What makes you so {word}?", f"How nice that you are {word}!"])
    return rng.choice([f"I am {word} today.", f"I feel {word}.", f"Today I am very {word}."]), reply if good else answer[word]


# ---- known by heart ------------------------------------------------------------------------------------------------


def person(rng):
    who = rng.choice(list(PEOPLE))
    work, colour, food, place, day = PEOPLE[who]
    article = "an" if work[0] in "aeiou" else "a"
    return rng.choice(
        [
            (rng.choice([f"Who is {who}?", f"What does {who} do?", f"What is {who}'s work?"]),
             rng.choice([f"{who} is the {work} of Harrow Yard.", f"{who} works as {article} {work}."])),
            (rng.choice([f"What colour does {who} like?", f"What is {who}'s favourite colour?"]),
             rng.choice([f"{who} likes {colour} best.", f"{who}'s favourite colour is {colour}."])),
            (rng.choice([f"What does {who} like to eat?", f"What is {who}'s favourite food?", f"What shall we cook for {who}?"]),
             rng.choice([f"{who} loves {food}.", f"{who} likes {food} most."])),
            (rng.choice([f"Where is {who}?", f"Where can I find {who}?", f"Where does {who} like to be?"]),
             rng.choice([f"{who} is mostly {at(place)}.", f"Look for {who} {at(place)}."])),
            (rng.choice([f"When is {who} busy?", f"On what day is {who} busy?"]),
             rng.choice([f"{who} is busy on {day}.", f"On {day} {who} has a lot of work."])),
            (rng.choice([f"Tell me about {who}.", f"What do you know about {who}?"]),
             f"{who} is our {work}. {who} likes {colour} things and {food}, and is mostly {at(place)}."),
            (rng.choice([f"Who is the {work}?", f"Who works as {article} {work}?", f"Do we have {article} {work}?"]),
             rng.choice([f"The {work} is {who}.", f"{who} is the {work}."])),
        ]
    )  # fmt: skip


def robot(rng):
    who = rng.choice(list(ROBOTS))
    job, place, colour = ROBOTS[who]
    return rng.choice(
        [
            (rng.choice([f"Who is {who}?", f"What is {who}?", f"Tell me about the robot {who}."]),
             rng.choice([f"{who} is the {colour} robot. Its work is to {job}.", f"{who} is a {colour} robot that can {job}."])),
            (rng.choice([f"What does the robot {who} do?", f"What is {who}'s job?"]), f"{who} is here to {job}."),
            (rng.choice([f"Where does {who} charge?", f"Where does the robot {who} sleep?"]), f"{who} charges {at(place)}."),
            (f"Which robot can {job}?", rng.choice([f"That is {who}.", f"{who} can {job}."])),
            ("Which robots live here?", "Four robots live here: Pip, Dot, Rook and Wick."),
        ]
    )  # fmt: skip


def animal(rng):
    kind = rng.choice(list(ANIMALS))
    name, habit, place = ANIMALS[kind]
    return rng.choice(
        [
            (rng.choice([f"What is the name of the {kind}?", f"What is the {kind} called?"]),
             rng.choice([f"The {kind} is called {name}.", f"Its name is {name}."])),
            (rng.choice([f"Who is {name}?", f"What is {name}?"]), rng.choice([f"{name} is our {kind}.", f"{name} is the {kind}. It lives {at(place)}."])),
            (rng.choice([f"What does the {kind} do?", f"What does {name} do all day?"]), rng.choice([f"The {kind} {habit}.", f"{name} {habit}."])),
            (rng.choice([f"Where does the {kind} live?", f"Where is {name}?"]), f"{name} the {kind} lives {at(place)}."),
        ]
    )  # fmt: skip


def where_is_place(rng):
    place = rng.choice(list(MAP))
    side, other = MAP[place]
    return (
        rng.choice([f"Where is the {place}?", f"How do I find the {place}?", f"I am looking for the {place}.", f"Which way is the {place}?"]),
        rng.choice([f"The {place} is {side} the {other}.", f"You find the {place} {side} the {other}.", f"It is {side} the {other}."]),
    )


def thing_use(rng):
    thing = rng.choice(list(THINGS))
    use, made = THINGS[thing]
    return rng.choice(
        [
            (rng.choice([f"What is a {thing} for?", f"What do you do with a {thing}?", f"Why do we need a {thing}?"]),
             rng.choice([f"A {thing} is for {use}.", f"We use a {thing} for {use}.", f"It is good for {use}."])),
            (rng.choice([f"What is the {thing} made of?", f"What is a {thing} made of?"]), f"The {thing} is made of {made}."),
            (rng.choice([f"What do I need for {use}?", f"What is good for {use}?"]), rng.choice([f"You need a {thing} for {use}.", f"Take a {thing}."])),
        ]
    )  # fmt: skip


def why(rng):
    effect = rng.choice(list(REASONS))
    cause = REASONS[effect]
    question = rng.choice([f"Why is it that {effect}?", f"Can you explain why {effect}?", f"Tell me why {effect}.", f"{cap(effect)}. Why?"])
    return question, rng.choice([f"{cap(effect)} because {cause}.", f"Because {cause}.", f"It is simple: {cause}."])


# ---- small rules ---------------------------------------------------------------------------------------------------


def days(rng):
    i = rng.randrange(7)
    day, after, before = DAYS[i], DAYS[(i + 1) % 7], DAYS[(i - 1) % 7]
    return rng.choice(
        [
            (rng.choice([f"What day comes after {day}?", f"Today is {day}. What day is tomorrow?"]),
             rng.choice([f"After {day} comes {after}.", f"It is {after}."])),
            (rng.choice([f"What day comes before {day}?", f"Today is {day}. What day was yesterday?"]),
             rng.choice([f"Before {day} comes {before}.", f"It is {before}."])),
            ("Name the days of the week.", f"The days are {listed(DAYS)}."),
        ]
    )  # fmt: skip


def counting(rng):
    kind = rng.randrange(6)
    if kind == 0:
        a = rng.randint(0, 12)
        b = rng.randint(a + 2, min(a + 7, 20))
        words = rng.random() < 0.5
        run = [NUMBERS[n] if words else str(n) for n in range(a, b + 1)]
        return f"Count from {run[0]} to {run[-1]}.", ", ".join(run) + "." if rng.random() < 0.7 else f"Here you are: {', '.join(run)}."
    if kind == 1:
        n = rng.randint(0, 99)
        return rng.choice([f"What number comes after {n}?", f"What is one more than {n}?"]), rng.choice([f"It is {n + 1}.", f"After {n} comes {n + 1}."])
    if kind == 2:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return rng.choice([f"What is {a} plus {b}?", f"How much is {a} and {b}?"]), f"{a} plus {b} is {a + b}."
    if kind == 3:
        n = rng.randrange(21)
        return rng.choice([f"Write {NUMBERS[n]} as a number.", f"How do you write {NUMBERS[n]}?"]), f"{cap(NUMBERS[n])} is {n}."
    if kind == 4:
        n = rng.randrange(21)
        return rng.choice([f"Write {n} as a word.", f"Say {n} in words."]), f"{n} is {NUMBERS[n]}."
    a, b = rng.sample(range(100), 2)
    return f"Which is more, {a} or {b}?", f"{max(a, b)} is more than {min(a, b)}."


def opposite(rng):
    word = rng.choice(list(OPPOSITES))
    return (
        rng.choice([f"What is the opposite of {word}?", f"What is not {word}?", f"Say the opposite of {word}."]),
        rng.choice([f"The opposite of {word} is {OPPOSITES[word]}.", f"It is {OPPOSITES[word]}."]),
    )


def mixing(rng):
    pair = rng.choice(list(MIXES))
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    return (
        rng.choice([f"What do {a} and {b} make?", f"I mix {a} with {b}. What do I get?", f"What colour is {a} with {b}?"]),
        rng.choice([f"{cap(a)} and {b} make {MIXES[pair]}.", f"You get {MIXES[pair]}."]),
    )


def naming(rng):
    n = rng.randint(2, 4)
    kind, choices = rng.choice(
        [("colours", COLOURS), ("things", list(THINGS)), ("people", list(PEOPLE)), ("places", PLACES), ("days", DAYS), ("animals", list(ANIMALS))]
    )
    asked = rng.choice([f"Name {NUMBERS[n]} {kind}.", f"Tell me {NUMBERS[n]} {kind}.", f"Can you name {n} {kind}?"])
    return asked, cap(listed(rng.sample(choices, n))) + "."


# ---- read off the question -----------------------------------------------------------------------------------------


def words(rng, least: int, most: int) -> str:
    """Words in no order that means anything."""
    tables = [COLOURS, PLACES, NUMBERS, list(THINGS), DAYS, list(PEOPLE), OPENINGS, OTHER_WORDS, OTHER_WORDS]
    return " ".join(rng.choice(rng.choice(tables)) for _ in range(rng.randint(least, most)))


def phrase(rng):
    """Something to say: a thing, a thing somewhere, or a few words."""
    _, called = pick_thing(rng)
    return rng.choice(
        [called, f"the {called}", f"{called} {at(rng.choice(PLACES))}", rng.choice(TASKS),
         f"{rng.choice(list(PEOPLE))} and {rng.choice(list(ROBOTS))}", words(rng, 1, 1), words(rng, 2, 5)]
    )  # fmt: skip


def repeat(rng):
    said = phrase(rng)
    return rng.choice(
        [
            (f"Repeat: {said}", cap(said) + "."),
            (f"Say {said}.", cap(said) + "."),
            (f"Say \"{said}\" twice.", f"{cap(said)}, {said}."),
            (f"Put {said} in quotes.", f"\"{said}\""),
            (f"Write {said} in quotes.", f"\"{said}\""),
            (f"What does the label \"{said}\" say?", f"It says \"{said}\"."),
        ]
    )  # fmt: skip


def which(rng):
    """A small situation and a question that only the situation answers."""
    (_, one), (_, two) = pick_thing(rng), pick_thing(rng)
    if one == two:
        return which(rng)
    here, there = rng.sample(PLACES, 2)
    a, b = rng.sample(list(PEOPLE), 2)
    asked = rng.random() < 0.5
    kind = rng.randrange(3)
    if kind == 0:
        told = f"The {one} is {at(here)} and the {two} is {at(there)}."
        return f"{told} Where is the {one if asked else two}?", rng.choice(
            [f"The {one if asked else two} is {at(here if asked else there)}.", cap(at(here if asked else there)) + "."]
        )
    if kind == 1:
        told = f"{a} has the {one} and {b} has the {two}."
        return f"{told} Who has the {one if asked else two}?", rng.choice(
            [f"{a if asked else b} has the {one if asked else two}.", f"It is {a if asked else b}."]
        )
    told = f"{a} is {at(here)}. {b} is {at(there)}."
    return f"{told} Who is {at(here if asked else there)}?", f"{a if asked else b} is {at(here if asked else there)}."


def card(rng):
    """Labels and cards: the few places where this world writes quotes, braces and keys."""
    _, called = pick_thing(rng)
    place, who = rng.choice(PLACES), rng.choice(list(PEOPLE))
    n, said = number(rng, 2, 60)
    note = rng.choice(["card", "note", "label"])
    fields = [
        (f"the {called}", {"thing": called}),
        (f"the {called} {at(place)}", {"thing": called, "place": place}),
        (f"the {called} of {who}", {"thing": called, "owner": who}),
        (f"{who} {at(place)}", {"owner": who, "place": place}),
        (f"{said} {plural(called)} {at(place)}", {"number": n, "thing": plural(called), "place": place}),
        (f"{said} minutes {at(place)}", {"place": place, "minutes": n}),
        (f"{said} {plural(called)}", {"number": n, "thing": plural(called)}),
    ]
    text, values = rng.choice(fields)
    if rng.random() < 0.15:
        task = rng.choice(TASKS)
        text, values = f"{who}, {task}", {"owner": who, "job": task}
    return rng.choice([f"Write a {note} for {text}.", f"Make a {note}: {text}"]), compact(values)


def dictated(rng):
    """A card whose fields are told one by one."""
    (_, called), n = pick_thing(rng), rng.randint(2, 180)
    every = [
        ("thing", called), ("object", called), ("place", rng.choice(PLACES)), ("in", rng.choice(PLACES)), ("to", rng.choice(PLACES)),
        ("from", rng.choice(PLACES)), ("person", rng.choice(list(PEOPLE))), ("owner", rng.choice(list(PEOPLE))),
        ("task", rng.choice(TASKS)), ("side", rng.choice(["left", "right"])), ("way", rng.choice(["forward", "back"])),
        ("state", rng.choice(["on", "off"])), ("minutes", n), ("steps", n), ("degrees", n), ("number", n), ("object", rng.choice(OPENINGS)),
    ]  # fmt: skip
    values = dict(rng.sample(every, rng.randint(1, 3)))
    told = ", ".join(f"{key} {value}" for key, value in values.items())
    return rng.choice([f"Write a card with {told}.", f"Make a card: {told}"]), compact(values)


def compact(values: dict) -> str:
    return json.dumps(values, separators=(",", ":"))


def plan(rng):
    who = rng.choice(list(PEOPLE))
    first, second = rng.sample(TASKS, 2)
    day = rng.choice(DAYS)
    return rng.choice(
        [
            (f"On {day} I have to {first} and {second}. What comes first?", rng.choice([f"First you {first}, then you {second}.", f"Start with this: {first}."])),
            (f"Is it a good idea to {first} on {day}?", rng.choice([f"Yes, {day} is a good day to {first}.", f"Yes, you can {first} on {day}."])),
            (f"{who} wants to {first}. What shall I do?", rng.choice([f"You can help {who} to {first}.", f"Let {who} {first} while you {second}."])),
        ]
    )  # fmt: skip


def story(rng):
    who = rng.choice(list(PEOPLE))
    kind = rng.choice(list(ANIMALS))
    _, called = pick_thing(rng)
    here, there = rng.sample(PLACES, 2)
    lost = rng.choice(
        [
            f"One {rng.choice(DAYS)} {who} lost the {called}. {who} looked {at(here)}, but it was not there. At last {ANIMALS[kind][0]} the {kind} found it {at(there)}.",
            f"{who} went to the {here} to find the {called}. Pip came along and lit the way. Soon they were back with the {called}, and everyone was glad.",
            f"It was a quiet evening. {ANIMALS[kind][0]} the {kind} carried the {called} to the {here}. Nobody knew why, but {who} laughed for a long time.",
        ]
    )  # fmt: skip
    return rng.choice([f"Tell me a story about {who} and the {kind}.", f"Tell me a short story about the {called}.", f"Do you know a story about {who}?"]), lost


def yes_or_no(rng):
    kind = rng.randrange(3)
    right = rng.random() < 0.5
    if kind == 0:
        who = rng.choice(list(PEOPLE))
        work = PEOPLE[who][0]
        guess = work if right else rng.choice([p[0] for p in PEOPLE.values() if p[0] != work])
        return f"Is {who} the {guess}?", f"Yes, {who} is the {work}." if right else f"No, {who} is the {work}."
    if kind == 1:
        thing = rng.choice(list(THINGS))
        made = THINGS[thing][1]
        guess = made if right else rng.choice([m for m in ("clay", "wood", "tin", "glass", "iron", "wool", "cloth", "straw") if m != made])
        return f"Is the {thing} made of {guess}?", f"Yes, it is made of {made}." if right else f"No, it is made of {made}."
    _, called = pick_thing(rng)
    here, there = rng.sample(PLACES, 2)
    return f"The {called} is {at(here)}. Is it {at(here if right else there)}?", f"Yes, it is {at(here)}." if right else f"No, it is {at(here)}."


def order(rng):
    c = command(rng)
    return c.utterance, c.spoken


# (weight, topic)
TOPICS = [
    (4, greeting), (2, about_me), (2, thanks), (2, goodbye), (2, feeling), (6, person), (3, robot), (3, animal),
    (4, where_is_place), (5, thing_use), (3, why), (2, days), (5, counting), (2, opposite), (1, mixing), (2, naming),
    (10, repeat), (9, which), (7, card), (5, dictated), (3, plan), (4, story), (3, yes_or_no), (18, order),
]  # fmt: skip

SYSTEM = ["You are Pip, the house robot.", "You are a helpful robot.", "You are Pip. Answer in short sentences.", "You help the people of Harrow Yard."]


def conversation(rng: Random) -> list[dict]:
    """One to four exchanges, in one conversation out of six under a system message."""
    messages = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 1 / 6 else []
    weights = [w for w, _ in TOPICS]
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        _, topic = rng.choices(TOPICS, weights)[0]
        question, answer = topic(rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def corpus(seed: int, conversations: int):
    """`conversations` of them, the same for the same seed."""
    rng = Random(seed)
    for _ in range(conversations):
        yield conversation(rng)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--conversations", type=int, default=48_000)
    args = parser.parse_args()
    for messages in corpus(args.seed, args.conversations):
        sys.stdout.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
