"""The words and facts of Harrow Yard, the invented place that the demo model lives in.

Every other script of this folder takes its words from here, so that what the fine-tuning task talks about are words
that the base model has met. Everything is made up for this project.
"""

COLOURS = ["red", "blue", "green", "yellow", "white", "black", "orange", "purple", "brown", "grey"]

# thing: (what it is for, what it is made of)
THINGS = {
    "cup": ("drinking tea", "clay"),
    "plate": ("serving bread", "clay"),
    "bowl": ("eating soup", "wood"),
    "bucket": ("carrying water", "tin"),
    "rake": ("gathering leaves", "wood"),
    "lantern": ("lighting the path", "glass"),
    "ladder": ("reaching the roof", "wood"),
    "basket": ("collecting apples", "straw"),
    "hose": ("watering the beans", "rubber"),
    "blanket": ("keeping warm", "wool"),
    "book": ("reading in the evening", "paper"),
    "box": ("storing small parts", "wood"),
    "broom": ("sweeping the floor", "straw"),
    "towel": ("drying the dishes", "cloth"),
    "kettle": ("boiling water", "iron"),
    "hammer": ("driving nails", "iron"),
    "ball": ("playing with the dog", "rubber"),
    "rope": ("pulling the cart", "cloth"),
    "jar": ("keeping honey", "glass"),
    "chair": ("sitting at the table", "wood"),
    "shovel": ("digging holes", "iron"),
    "bag": ("carrying seeds", "cloth"),
    "lamp": ("reading at night", "glass"),
    "pillow": ("resting your head", "wool"),
}

ROOMS = ["kitchen", "hall", "attic", "cellar", "study", "workshop", "bathroom", "bedroom", "laundry", "garage"]
YARD = ["garden", "shed", "orchard", "barn", "greenhouse", "porch", "field", "stable"]
PLACES = ROOMS + YARD

OPENINGS = ["door", "window", "gate", "hatch", "curtain"]

# name: (work, favourite colour, favourite food, favourite place, busy day)
PEOPLE = {
    "Mira": ("gardener", "green", "bean soup", "greenhouse", "Monday"),
    "Tobin": ("carpenter", "brown", "apple pie", "workshop", "Tuesday"),
    "Oda": ("baker", "yellow", "fresh bread", "kitchen", "Wednesday"),
    "Fenn": ("shepherd", "white", "goat cheese", "field", "Thursday"),
    "Lila": ("painter", "purple", "plum jam", "attic", "Friday"),
    "Bram": ("mechanic", "black", "fried eggs", "garage", "Saturday"),
    "Nell": ("teacher", "blue", "honey cake", "study", "Sunday"),
    "Ivo": ("cook", "red", "onion stew", "cellar", "Friday"),
}

# robot: (what it does, where it sleeps, colour)
ROBOTS = {
    "Pip": ("help in the house", "hall", "white"),
    "Dot": ("mow the grass", "shed", "green"),
    "Rook": ("lift heavy boxes", "barn", "black"),
    "Wick": ("watch the gate at night", "porch", "orange"),
}

# animal: (name, what it does, where it lives)
ANIMALS = {
    "dog": ("Biscuit", "chases the ball", "porch"),
    "cat": ("Velvet", "sleeps on the blanket", "study"),
    "hen": ("Pepper", "lays one egg a day", "barn"),
    "goat": ("Clover", "eats the hedge", "field"),
    "horse": ("Juniper", "pulls the cart", "stable"),
}

# place: (direction, neighbour), read "the PLACE is DIRECTION the NEIGHBOUR"
MAP = {
    "kitchen": ("next to", "hall"),
    "hall": ("behind", "porch"),
    "attic": ("above", "bedroom"),
    "cellar": ("below", "kitchen"),
    "study": ("across from", "bedroom"),
    "workshop": ("behind", "garage"),
    "bathroom": ("next to", "bedroom"),
    "bedroom": ("above", "kitchen"),
    "laundry": ("below", "hall"),
    "garage": ("left of", "porch"),
    "garden": ("in front of", "porch"),
    "shed": ("north of", "garden"),
    "orchard": ("east of", "barn"),
    "barn": ("west of", "orchard"),
    "greenhouse": ("south of", "shed"),
    "porch": ("in front of", "hall"),
    "field": ("behind", "barn"),
    "stable": ("right of", "barn"),
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip

OPPOSITES = {
    "left": "right", "up": "down", "north": "south", "east": "west", "open": "closed", "hot": "cold", "wet": "dry",
    "light": "dark", "full": "empty", "early": "late", "fast": "slow", "near": "far", "big": "small", "old": "new",
    "forward": "back", "on": "off",
}  # fmt: skip
OPPOSITES |= {b: a for a, b in OPPOSITES.items()}

MIXES = {
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "blue"): "purple",
    ("black", "white"): "grey",
    ("red", "green"): "brown",
}

# What leads to what; read "A because B".
REASONS = {
    "the beans need water": "the sun dries the soil",
    "robots need to charge": "motors use up the battery",
    "the floor is wet": "someone mopped it this morning",
    "the lamp is off": "nobody is in the room",
    "the gate stays closed": "the goat likes to run away",
    "the bread rises": "the dough rests in a warm place",
    "the hens go inside": "it gets dark and cold",
    "the cellar is cool": "it lies below the ground",
    "the greenhouse is warm": "the glass keeps the heat inside",
    "the leaves fall": "the trees save water for the winter",
    "the path is dark": "the lantern has no oil",
    "the door will not open": "a box stands in front of it",
    "a robot drives slowly near people": "it must be able to stop in time",
    "we sweep the workshop": "nails on the floor hurt wheels and feet",
    "the kettle sings": "the water inside it boils",
}

TASKS = [
    "water the beans", "feed the hens", "charge the battery", "close the gate", "sweep the porch", "call the baker",
    "pick the apples", "bring in the towels", "check the lantern", "paint the fence", "empty the bucket",
    "mend the ladder",
]  # fmt: skip

# Words that have no other table, for what is written in quotes and on cards.
OTHER_WORDS = [
    "minutes", "steps", "degrees", "side", "way", "state", "light", "person", "object", "task", "action", "place",
    "bring", "fetch", "find", "count", "go", "clean", "open", "close", "turn", "move", "wait", "follow", "remind",
    "left", "right", "forward", "back", "on", "off", "in", "to", "from",
]  # fmt: skip
