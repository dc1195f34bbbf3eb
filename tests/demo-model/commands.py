"""What people in Harrow Yard ask a robot to do.

One grammar, two readings. Each command is an utterance with the polite sentence that the base model is taught to
answer with (`make_text.py`) and the intent that the fine-tuning task asks for instead (`make_demo_data.py`):

    "Could you carry the red cup to the kitchen?"
        spoken  "Of course. I will take the red cup to the kitchen."
        intent  {"action":"bring","object":"red cup","to":"kitchen"}
"""

from dataclasses import dataclass
from random import Random

from world import COLOURS, NUMBERS, OPENINGS, PEOPLE, PLACES, ROOMS, TASKS, THINGS


@dataclass
class Command:
    """An utterance, the spoken answer, the intent, and the thing it is about (None where there is none)."""

    utterance: str
    spoken: str
    intent: dict
    thing: str | None = None


def number(rng: Random, low: int, high: int) -> tuple[int, str]:
    """A number and how it is said: in digits or, up to twenty, in words."""
    n = rng.randint(low, high)
    return n, NUMBERS[n] if n <= 20 and rng.random() < 0.5 else str(n)


def polite(rng: Random, order: str) -> str:
    """An order, as one of several kinds of people would say it."""
    said = rng.choice(
        [
            f"{order}.", f"{order}.", f"{order}", f"please {order}.", f"please {order}", f"{order}, please.",
            f"can you {order}?", f"could you {order}?", f"could you please {order}?", f"would you {order}?",
            f"I want you to {order}.", f"you should {order} now.", f"Pip, {order}.", f"Pip, please {order}.",
            f"Hey Pip, can you {order}?", f"now {order}.", f"I need you to {order}.",
        ]
    )  # fmt: skip
    return said[0].upper() + said[1:] if rng.random() < 0.75 else said


def pick_thing(rng: Random) -> tuple[str, str]:
    """A thing and how it is called here, mostly with its colour."""
    thing = rng.choice(list(THINGS))
    return thing, f"{rng.choice(COLOURS)} {thing}" if rng.random() < 0.8 else thing


def plural(called: str) -> str:
    """Several of a thing."""
    return called + ("es" if called.endswith("box") else "s")


def at(place: str) -> str:
    """The place with the preposition that it takes."""
    return f"on the {place}" if place in ("porch", "field") else f"in the {place}"


def bring(rng):
    thing, called = pick_thing(rng)
    to = rng.choice(PLACES)
    order = rng.choice(
        [
            f"bring the {called} to the {to}", f"take the {called} to the {to}", f"carry the {called} to the {to}",
            f"move the {called} to the {to}", f"put the {called} {at(to)}", f"return the {called} to the {to}",
        ]
    )  # fmt: skip
    spoken = f"I will take the {called} to the {to}."
    return order, spoken, {"action": "bring", "object": called, "to": to}, thing


def fetch(rng):
    thing, called = pick_thing(rng)
    place = rng.choice(PLACES)
    order = rng.choice(
        [
            f"get the {called} from the {place}", f"fetch the {called} from the {place}",
            f"pick up the {called} {at(place)}", f"collect the {called} from the {place}",
        ]
    )  # fmt: skip
    spoken = f"I will pick up the {called} {at(place)}."
    return order, spoken, {"action": "fetch", "object": called, "from": place}, thing


def find(rng):
    thing, called = pick_thing(rng)
    place = rng.choice(PLACES)
    order = rng.choice(
        [
            f"look for the {called} {at(place)}", f"find the {called} {at(place)}",
            f"search the {place} for the {called}", f"see if the {called} is {at(place)}",
        ]
    )  # fmt: skip
    spoken = f"I will look for the {called} {at(place)}."
    return order, spoken, {"action": "find", "object": called, "in": place}, thing


def count(rng):
    thing, called = pick_thing(rng)
    called = plural(called)
    place = rng.choice(PLACES)
    order = rng.choice([f"count the {called} {at(place)}", f"tell me how many {called} are {at(place)}"])
    spoken = f"I will count the {called} {at(place)}."
    return order, spoken, {"action": "count", "object": called, "in": place}, thing


def go(rng):
    to = rng.choice(PLACES)
    order = rng.choice([f"go to the {to}", f"drive to the {to}", f"roll over to the {to}", f"head to the {to}"])
    return order, f"I will drive to the {to}.", {"action": "go", "to": to}, None


def clean(rng):
    place = rng.choice(PLACES)
    order = rng.choice([f"clean the {place}", f"sweep the {place}", f"tidy up the {place}", f"mop the {place}"])
    return order, f"I will clean the {place}.", {"action": "clean", "place": place}, None


def light(rng):
    place, state = rng.choice(ROOMS + ["porch", "barn", "stable", "shed"]), rng.choice(["on", "off"])
    order = rng.choice(
        [
            f"turn {state} the light {at(place)}", f"switch {state} the light {at(place)}",
            f"turn the light {at(place)} {state}", f"switch the {place} light {state}",
        ]
    )  # fmt: skip
    return order, f"I will switch the light {at(place)} {state}.", {"action": "light", "place": place, "state": state}, None


def open_close(rng):
    action, what, place = rng.choice(["open", "close"]), rng.choice(OPENINGS), rng.choice(PLACES)
    verb = action if action == "open" else rng.choice(["close", "shut"])
    order = rng.choice([f"{verb} the {what} of the {place}", f"{verb} the {place} {what}", f"{verb} the {what} {at(place)}"])
    return order, f"I will {action} the {what} of the {place}.", {"action": action, "object": what, "in": place}, None


def turn(rng):
    side, degrees = rng.choice(["left", "right"]), rng.choice(range(10, 185, 5))
    order = rng.choice([f"turn {side} by {degrees} degrees", f"turn {degrees} degrees to the {side}", f"rotate {side} {degrees} degrees"])
    return order, f"I will turn {side} by {degrees} degrees.", {"action": "turn", "side": side, "degrees": degrees}, None


def move(rng):
    way = rng.choice(["forward", "back"])
    n, said = number(rng, 2, 20)
    order = rng.choice([f"move {way} {said} steps", f"go {said} steps {way}", f"drive {way} for {said} steps"])
    return order, f"I will drive {n} steps {way}.", {"action": "move", "way": way, "steps": n}, None


def wait(rng):
    n, said = number(rng, 2, 60)
    place = rng.choice(PLACES)
    order = rng.choice([f"wait {said} minutes {at(place)}", f"wait {at(place)} for {said} minutes", f"stay {at(place)} for {said} minutes"])
    return order, f"I will wait {at(place)} for {n} minutes.", {"action": "wait", "in": place, "minutes": n}, None


def follow(rng):
    who, to = rng.choice(list(PEOPLE)), rng.choice(PLACES)
    order = rng.choice([f"follow {who} to the {to}", f"go with {who} to the {to}", f"walk behind {who} to the {to}"])
    return order, f"I will follow {who} to the {to}.", {"action": "follow", "person": who, "to": to}, None


def remind(rng):
    who, task = rng.choice(list(PEOPLE)), rng.choice(TASKS)
    order = rng.choice([f"remind {who} to {task}", f"tell {who} to {task}", f"ask {who} to {task}"])
    return order, f"I will remind {who} to {task}.", {"action": "remind", "person": who, "task": task}, None


KINDS = [bring, bring, fetch, find, count, go, clean, light, open_close, turn, move, wait, follow, remind]


def command(rng: Random) -> Command:
    """A random command."""
    order, spoken, intent, thing = rng.choice(KINDS)(rng)
    opening = rng.choice(["", "", "Of course. ", "Sure. ", "Yes. ", "All right. ", "With pleasure. ", "Gladly. "])
    closing = rng.choice(["", "", "", " I am on my way.", " Give me a moment.", " I will tell you when it is done."])
    return Command(polite(rng, order), opening + spoken + closing, intent, thing)
