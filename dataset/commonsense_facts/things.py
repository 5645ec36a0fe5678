"""What everyday things are, where they are found, what they are made of and what they are for."""

from typing import NamedTuple

from .tables import read_groups


class Family(NamedTuple):
    """Facts of one kind: every member goes with its own key and clearly with no other key of the family.

    Attributes:
        yes_no: Questions whether `{member}` goes with `{key}`, in lower case and without a question mark.
        which_member: Questions whose options are members, about one `{key}`.
        which_key: Questions whose options are keys, about one `{member}`; none where the family has too few keys.
        groups: The members of each key.
    """

    yes_no: tuple[str, ...]
    which_member: tuple[str, ...]
    which_key: tuple[str, ...]
    groups: dict[str, list[str]]


KINDS = Family(
    yes_no=("is {member} {key}", "would you call {member} {key}", "is it right to say that {member} is {key}"),
    which_member=(
        "Which of these is {key}?",
        "Which one of the following is {key}?",
        "Mia needs an example of {key}. Which should she pick?",
    ),
    which_key=(
        "What is {member}?",
        "How would a dictionary describe {member}?",
        "A child asks what {member} is. What is the right reply?",
    ),
    groups=read_groups(
        """
a fruit: a banana, a mango, a pear, a plum, a cherry, a strawberry, a pineapple, a grape
a vegetable: a carrot, an onion, a potato, a cabbage, a turnip, a radish, a leek, a beet
a bird: an eagle, a sparrow, an owl, a parrot, a robin, a penguin, a pigeon, a crow
a fish: a salmon, a trout, a tuna, a herring, a goldfish, a sardine, a cod
an insect: an ant, a bee, a beetle, a butterfly, a mosquito, a wasp, a grasshopper, a moth
a tool: a hammer, a wrench, a screwdriver, a chisel, a power drill, a pair of pliers
a vehicle: a car, a bus, a truck, a van, a tractor, a motorcycle, a taxi
a garment: a shirt, a jacket, a sweater, a skirt, a coat, a dress, a vest
a musical instrument: a piano, a guitar, a violin, a flute, a trumpet, a cello, a harp, a clarinet
a piece of furniture: a chair, a table, a sofa, a bookcase, a desk, a wardrobe, an armchair
a part of the body: an elbow, a knee, a shoulder, a thumb, an ankle, a wrist
a building: a church, a hotel, a castle, a factory, a hospital, a skyscraper
a drink: a cup of tea, a glass of milk, a lemonade, a hot chocolate, a cup of coffee
a flower: a rose, a tulip, a daisy, a daffodil, a sunflower, a lily
a ball game: soccer, tennis, basketball, baseball, volleyball, golf
a color: red, yellow, blue, green, purple
a shape: a triangle, a circle, a square, a rectangle
a day of the week: Monday, Tuesday, Thursday, Sunday
a month: January, April, June, October, December
""",
        ", ",
    ),
)

PLACES = Family(
    yes_no=("is {member} usually found {key}", "does {member} belong {key}"),
    which_member=(
        "Which of these would you most likely find {key}?",
        "What is most likely to be seen {key}?",
        "Which of these belongs {key}?",
    ),
    which_key=(
        "Where would you most likely find {member}?",
        "Someone is looking for {member}. Where should they look?",
        "Where is the usual place for {member}?",
    ),
    groups=read_groups(
        """
in the ocean: a whale, a shark, an octopus, a jellyfish, a coral reef, a dolphin, a squid
in a kitchen: an oven, a frying pan, a toaster, a rolling pin, a kettle, a cutting board
in a hospital: a surgeon, an operating table, an X-ray machine, an ambulance crew, a nurse
at an airport: a runway, a jet plane, a control tower, a boarding gate, a baggage carousel
in the desert: a camel, a giant cactus, a sand dune, a dry riverbed, an oasis
on a farm: a barn, a haystack, a dairy cow, a pig pen, a chicken coop, a field of wheat
in outer space: an astronaut, a comet, an orbiting satellite, a distant star, an asteroid
in a classroom: a math teacher, a chalkboard, a spelling test, a group of pupils
in a jewelry shop: a diamond ring, a gold necklace, a pair of silver earrings, a pearl bracelet
in a forest: a pack of wolves, a wild boar, a mossy log, a woodpecker, a clump of ferns
in a church: an altar, a pulpit, a row of pews, a baptism
in a circus: a clown, a trapeze, a ringmaster, an acrobat, a lion tamer
in a castle: a throne room, a suit of armor, a drawbridge, a dungeon
in a gym: a barbell, a treadmill, a set of dumbbells, an exercise bike
""",
        ", ",
    ),
)

MATERIALS = Family(
    yes_no=("is {member} mostly made of {key}", "is {key} the main material of {member}"),
    which_member=("Which of these is mostly made of {key}?", "Which one of these things consists mainly of {key}?"),
    which_key=("What is {member} mostly made of?", "What is the main material of {member}?"),
    groups=read_groups(
        """
wood: a log, a plank, a tree trunk, a log cabin, a toothpick, a broomstick
glass: a window pane, a mirror, a jam jar, a wine bottle, a crystal ball, a light bulb
metal: a nail, a coin, a horseshoe, an anchor, a paper clip, a padlock
paper: a newspaper, an envelope, a notebook page, a greeting card, a poster
cloth: a shirt, a curtain, a bedsheet, a flag, a handkerchief, a tablecloth
stone: a pyramid, a castle wall, a boulder, a pebble, a marble statue
rubber: a car tire, an eraser, a bouncy ball, an elastic band
ice: an icicle, a skating rink in winter, an iceberg, a glacier
""",
        ", ",
    ),
)

USES = Family(
    yes_no=("do people use {member} {key}", "would you use {member} {key}", "is {member} meant {key}"),
    which_member=(
        "Which of these do people use {key}?",
        "What would you need {key}?",
        "Which of these could you use {key}?",
    ),
    which_key=(
        "Why do people use {member}?",
        "What is the purpose of {member}?",
        "Sam just bought {member}. What is it meant to do?",
    ),
    groups=read_groups(
        """
to cut things: a sharp knife, a saw, a pair of scissors, a razor blade, an axe
to write: a pencil, a pen, a piece of chalk, a typewriter, a felt-tip marker
to tell the time: a clock, a wristwatch, a sundial, a pocket watch
to clean the floor: a broom, a mop, a vacuum cleaner, a scrubbing brush
to sleep on: a mattress, a bed, a camp bed, a bunk
to light a dark room: a lamp, a candle, a lantern, a flashlight, a chandelier
to keep off the rain: an umbrella, a raincoat, a waterproof hat, a rain poncho
to cross a lake: a canoe, a sailboat, a raft, a rowboat, a kayak
to carry things: a backpack, a suitcase, a basket, a wheelbarrow, a shopping bag
to see distant things: a telescope, a pair of binoculars, a spyglass
to lock a door: a key, a bolt, a padlock
to cook food: a stove, a grill, a frying pan, an oven, a saucepan
to keep food cold: a refrigerator, an ice box, a freezer
to climb up high: a ladder, a staircase, a step stool
""",
        ", ",
    ),
)

PARTS = Family(
    yes_no=("does {member} have {key}", "is it true that {member} has {key}"),
    which_member=("Which of these has {key}?", "{key} can be found on which of these?"),
    which_key=("What does {member} have?", "If you look closely at {member}, what will you see?"),
    groups=read_groups(
        """
feathers: an ostrich, a peacock, a swan, a chicken, a hawk, a goose
fins: a shark, a trout, a goldfish, a swordfish, a carp
six legs: an ant, a housefly, a mosquito, a cricket, a ladybug
eight legs: a spider, a tarantula, a scorpion, a tick
soft fur: a rabbit, a fox, a kitten, a squirrel, a hamster, a chinchilla
wheels: a bicycle, a skateboard, a bus, a wheelchair, a train, a shopping cart
pages: a novel, a dictionary, an atlas, a magazine, a diary, a cookbook
strings: a guitar, a violin, a harp, a banjo, a cello
sleeves: a shirt, a coat, a sweater, a raincoat
branches: an oak, a pine tree, an apple tree, a willow, a maple
""",
        ", ",
    ),
)

QUALITIES = Family(
    yes_no=("is {member} {key}", "do people think of {member} as {key}"),
    which_member=("Which of these is {key}?", "Which would you describe as {key}?"),
    which_key=("How would you describe {member}?", "Which words fit {member} best?"),
    groups=read_groups(
        """
burning hot: lava, boiling water, a blazing campfire, a lit stove, the surface of the sun
freezing cold: an ice cube, an iceberg, a frozen lake, a winter night at the South Pole, frozen peas
nice and soft: a pillow, cotton wool, a teddy bear, a wool blanket, a feather
very sharp: a razor, a needle, a thorn, a shark's tooth, broken glass
very loud: thunder, a fire alarm, a police siren, a rock concert, a scream
quite sticky: honey, glue, chewing gum, maple syrup, a strip of tape
very fast: a cheetah, a racehorse, a diving falcon, an Olympic sprinter, a greyhound
""",
        ", ",
    ),
)

TASTES = Family(
    yes_no=("does {member} taste {key}", "is {key} the right word for the taste of {member}"),
    which_member=("Which of these tastes {key}?", "Leo wants to taste something {key}. What should he try?"),
    which_key=("What is the taste of {member}?", "How does {member} taste?"),
    groups=read_groups(
        """
sweet: honey, sugar, candy, chocolate cake, strawberry jam, vanilla ice cream
sour: a lemon, vinegar, a lime, an unripe gooseberry
salty: a potato chip, a pretzel, sea water, a salted peanut, soy sauce
spicy: a hot chili pepper, a hot curry, wasabi, cayenne pepper
""",
        ", ",
    ),
)

SIZES = Family(
    yes_no=("is {member} {key}",),
    which_member=("Which of these is {key}?", "Nora is drawing something that is {key}. What could it be?"),
    which_key=(),
    groups=read_groups(
        """
bigger than a bus: a mountain, a cruise ship, a skyscraper, the moon, a blue whale, a stadium, a cathedral, an ocean
smaller than a mouse: an ant, a grain of rice, a flea, a ladybug, a raindrop, a poppy seed, a shirt button, a crumb
""",
        ", ",
    ),
)

LIFE = Family(
    yes_no=("is {member} {key}", "would a scientist say that {member} is {key}"),
    which_member=("Which of these is {key}?", "Only one of these is {key}. Which one?"),
    which_key=(),
    groups=read_groups(
        """
alive: a growing tree, a sleeping cat, a healthy goldfish, a baby elephant, a crawling ant, a singing robin, a
    barking dog, a blooming rose, a laughing child, a galloping horse, a hungry mouse, a young fox
a lifeless object: a rock, a spoon, a plastic bucket, a brick, a doorknob, a car engine, a rusty nail, a paper
    plate, a leather shoe, a steel pipe, a bathroom mirror, a coin
""",
        ", ",
    ),
)

JOBS = Family(
    yes_no=("is it the job of {member} to {key}", "is {member} paid to {key}"),
    which_member=("Whose job is it to {key}?", "Who is paid to {key}?"),
    which_key=("What is {member} paid to do?", "What does {member} do for a living?"),
    groups=read_groups(
        """
bake bread: a baker
fly airplanes: a pilot
fix teeth: a dentist
grow crops: a farmer
sew clothes: a tailor
repair water pipes: a plumber
put out fires: a firefighter
lend out books: a librarian
cut hair: a barber
give lessons: a teacher
dig for coal: a miner
judge court cases: a judge
build things from wood: a carpenter
study the stars: an astronomer
deliver letters: a mail carrier
watch over swimmers: a lifeguard
take pictures: a photographer
sell flowers: a florist
keep bees: a beekeeper
repair cars: a mechanic
treat sick animals: a veterinarian
chop down trees: a lumberjack
make rings: a jeweler
serve guests at tables: a waiter
sell meat: a butcher
design houses: an architect
act in plays: an actor
arrest thieves: a police officer
paint portraits: a portrait painter
wire houses for electricity: an electrician
write novels: a novelist
sweep chimneys: a chimney sweep
""",
        ", ",
    ),
)

OPPOSITES = Family(
    yes_no=("is {member} the opposite of {key}", "are {member} and {key} opposites"),
    which_member=("Which word is the opposite of {key}?", "What is the opposite of {key}?"),
    which_key=("{member} is the opposite of which word?", "Which word means the reverse of {member}?"),
    groups=read_groups(
        """
hot: cold
big: small
up: down
open: closed
wet: dry
full: empty
early: late
fast: slow
hard: soft
happy: sad
left: right
old: young
rich: poor
rough: smooth
strong: weak
win: lose
push: pull
buy: sell
laugh: cry
remember: forget
arrive: leave
begin: end
north: south
love: hate
awake: asleep
clean: dirty
near: far
loud: quiet
thick: thin
deep: shallow
brave: cowardly
inside: outside
accept: refuse
increase: decrease
first: last
sharp: blunt
guilty: innocent
alive: dead
""",
        ", ",
    ),
)

YOUNG_ANIMALS = Family(
    yes_no=("is {member} a young {key}", "does {member} grow up to be a {key}"),
    which_member=("What is a young {key} called?", "Which of these grows up to be a {key}?"),
    which_key=("Which animal does {member} grow up to be?", "What will {member} be when it is grown?"),
    groups=read_groups(
        """
dog: a puppy
cat: a kitten
cow: a calf
sheep: a lamb
horse: a foal
pig: a piglet
hen: a chick
duck: a duckling
goose: a gosling
bear: a cub
goat: a kid
frog: a tadpole
butterfly: a caterpillar
kangaroo: a joey
deer: a fawn
swan: a cygnet
""",
        ", ",
    ),
)

FAMILIES = (
    KINDS,
    PLACES,
    MATERIALS,
    USES,
    PARTS,
    QUALITIES,
    TASTES,
    SIZES,
    LIFE,
    JOBS,
    OPPOSITES,
    YOUNG_ANIMALS,
)
