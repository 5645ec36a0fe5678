"""How people feel, what they want and need, and which of two things a sentence speaks of."""

from typing import NamedTuple

from .tables import read_rows


class Moment(NamedTuple):
    """Something that happens to `{name}`, the right answer, and the answers that are clearly wrong.

    A moment without wrong answers of its own takes them from the moments of other groups.
    """

    group: str
    event: str
    answer: str
    wrong: tuple[str, ...] = ()


class Contrast(NamedTuple):
    """Two kinds of things that differ in one quality, and what one says of either.

    Attributes:
        frames: Sentences that mention `{first}` and `{second}`, a thing of each kind in either order; a claim follows.
        claims: What is true of the first kind only and of the second kind only; `_` stands for the thing.
        pairs: Things of the first kind, each with one of the second kind.
    """

    frames: tuple[str, str]
    claims: tuple[str, str]
    pairs: list[tuple[str, str]]


NAMES = ("Alex", "Casey", "Jordan", "Taylor", "Robin", "Sasha", "Kai", "Quinn", "Jamie", "Riley", "Morgan", "Skyler")


def _feelings(table: str) -> list[Moment]:
    """Read lines of the form `feeling | wrong, wrong, ... | event; event; ...`."""
    return [
        Moment(feeling, event, feeling, tuple(wrong.split(", ")))
        for feeling, wrong, events in read_rows(table)
        for event in events.split("; ")
    ]


def _moments(table: str) -> list[Moment]:
    """Read lines of the form `group | event | answer`."""
    return [Moment(*row) for row in read_rows(table)]


FEELING_QUESTIONS = ("How would {name} feel afterwards?", "Which word describes {name} best now?")
FEELINGS = _feelings("""
sad | proud, joyful, grateful, hungry | {name}'s old dog died; {name}'s best friend moved far away; {name}'s
    favorite toy was lost forever; {name} spent a birthday all alone; {name}'s beloved grandmother passed away;
    {name} was left out by the other children; {name} failed the exam
angry | proud, joyful, grateful, hungry | Someone scratched {name}'s new car on purpose; A thief stole {name}'s
    bike; A neighbor insulted {name} for no reason; A stranger pushed in front of {name} in line; {name}'s brother
    broke {name}'s phone and laughed; A coworker took the credit for {name}'s work
frightened | proud, joyful, grateful, bored | {name} saw a snake in the bed; {name} heard footsteps in the dark,
    empty house; A growling bear came toward {name}; {name} got lost in the woods at night; {name}'s plane suddenly
    dropped in a storm; A big dog chased {name} down the street
embarrassed | proud, joyful, grateful, hungry | {name} tripped and fell in front of the whole school; {name}
    spilled soup on the host's white carpet; {name} forgot the words in the middle of the song; {name} called the
    teacher "Mom" in class; {name}'s pants ripped at the party; {name} waved at a stranger by mistake
proud | sad, angry, embarrassed, frightened, bored | {name} won first prize in the contest; {name} got the best
    grade in the class; {name} finished building a treehouse; {name}'s painting was hung in a gallery; {name}
    learned to swim after months of practice; {name} scored the winning goal
grateful | angry, embarrassed, jealous, bored, tired | A kind stranger returned {name}'s lost wallet; {name}'s
    friends helped {name} move house; A doctor saved {name}'s life; A classmate explained the hard homework to
    {name}; A neighbor looked after {name}'s sick cat; The firefighters rescued {name}'s family
joyful | sad, angry, embarrassed, frightened, jealous | {name} got a puppy as a birthday present; {name} danced and
    laughed with friends all evening; {name}'s sister came home after a year away; {name} married a childhood
    sweetheart; {name} opened the presents under the Christmas tree; {name} won a trip to the seaside
tired | angry, embarrassed, jealous, bored | {name} ran a whole marathon; {name} worked all night without sleep;
    {name} carried heavy boxes all day; {name} hiked up and down a mountain; {name} got up at three in the morning;
    {name} dug in the garden for nine hours
bored | proud, grateful, frightened, jealous | {name} waited four hours with nothing to do; {name} sat through a
    very long, dull speech; {name} watched paint dry all afternoon; {name} had to copy the same page fifty times;
    {name} was stuck inside with no games or books
hungry | proud, jealous, embarrassed, grateful | {name} had not eaten since yesterday; {name} skipped breakfast and
    lunch; {name} smelled dinner after a day without food; {name} could not find anything to eat all day
jealous | hungry, grateful, tired, joyful | {name}'s rival got the prize that {name} wanted; {name}'s sister got a
    far nicer gift than {name} did; A friend showed off the bike that {name} could not afford
""")

WANT_QUESTIONS = ("What will {name} want to do next?", "What is {name} likely to do now?")
WANTS = _moments("""
body | {name} was thirsty after a long run | drink some cold water
body | {name} had not eaten all day | have a big meal
body | {name}'s stomach growled at noon | eat some lunch
body | {name} yawned and could not stay awake | go to bed
body | {name} came home after a night shift | lie down and sleep
body | {name} shivered in the cold wind | put on a warm coat
body | {name} stepped out into deep snow in slippers | get a pair of boots
body | {name} was sweating in the hot sun | rest in the shade
body | {name} was caught in a sudden downpour | run for shelter
body | {name} saw dark rain clouds before going out | take an umbrella
body | {name} fell into the mud | take a shower
body | {name}'s hands were covered in paint | wash those hands
body | {name} had a high fever | see a doctor
body | {name} had a terrible toothache | go to the dentist
body | {name} cut a finger on a knife | put on a bandage
body | {name} burned a hand on the stove | hold it under cold water
cleaning | {name} spilled juice all over the table | wipe up the mess
cleaning | {name} noticed thick dust on the shelf | dust the shelf
repair | {name}'s car broke down on the road | call a mechanic
repair | {name}'s bike had a flat tire | pump up the tire
repair | {name}'s roof started to leak | have the roof fixed
keys | {name} was locked out of the house | find a spare key
keys | {name} lost the car keys in the park | search the grass for them
danger | {name} smelled smoke and saw flames | call the fire department
danger | {name} saw a man breaking into a shop | call the police
social | {name} broke a friend's vase by accident | say sorry to the friend
social | {name} shouted at a sister for no reason | apologize to the sister
social | {name} got a lovely gift in the mail | write a thank-you card
social | An aunt drove {name} to the airport | thank the aunt for the ride
social | {name} passed the final exam | celebrate with friends
social | {name}'s best friend has a birthday today | wish the friend a happy birthday
school | {name} has a math test in the morning | study the math book
school | {name} did not understand the lesson | ask the teacher for help
money | {name} ran out of cash | get money from the bank
money | {name} found a stranger's wallet | give the wallet back
pets | {name}'s dog was scratching at the door | take the dog outside
pets | {name}'s cat meowed at an empty bowl | fill the bowl with cat food
baby | {name}'s baby started to cry | comfort the baby
travel | {name} came too late and missed the bus | wait for the next bus
travel | {name} reached the hotel with two suitcases | check in at the front desk
phone | {name}'s phone battery was almost empty | charge the phone
phone | {name} missed a call from home | call home again
light | {name} walked into a dark room | switch on the light
garden | {name}'s tomato plants were drying out | water the tomato plants
money | {name} wanted to earn some money | look for a job
money | {name} was tired of the old job | send out job applications
school | {name} could not study because of loud music | ask for quiet
leisure | {name} borrowed an exciting novel | read the novel
leisure | {name} got a new guitar | practice some songs
""")

NEED_QUESTIONS = ("What does {name} need to do before this?", "What did {name} have to do first?")
NEEDS = _moments("""
cooking | {name} baked a chocolate cake | get flour, eggs and cocoa
cooking | {name} cooked soup for the family | chop some vegetables
cooking | {name} fried two eggs | heat up a pan
travel | {name} flew to another country | buy a plane ticket
travel | {name} drove across the state | fill the car with gas
travel | {name} took the train to the city | go to the train station
swimming | {name} swam in the lake | put on a swimsuit
effort | {name} taught a class to swim | become a good swimmer
letters | {name} mailed a letter | write the address on it
letters | {name} sent a parcel to an uncle | pack up the parcel
party | {name} threw a birthday party | invite some guests
party | {name} blew up twenty balloons | buy a bag of balloons
effort | {name} got a perfect score on the test | study hard
effort | {name} handed in the essay | write the essay
effort | {name} graduated from college | pass all the exams
garden | {name} harvested a lot of tomatoes | plant tomato seeds
garden | {name} mowed the lawn | take out the lawn mower
reading | {name} read a book from the library | borrow the book
painting | {name} painted the fence white | buy white paint
painting | {name} hung up a finished painting | paint a picture
pets | {name} took home a puppy | visit the animal shelter
pets | {name} walked the dog | put the dog on a leash
effort | {name} bought a house | save a lot of money
money | {name} paid with cash | take money from the bank
effort | {name} started a new job | go to a job interview
effort | {name} was named the best worker | work very hard
effort | {name} played a piano concert | practice the piano
music | {name} sang on the stage | learn the words of the song
outdoors | {name} caught three fish | bait the hook
outdoors | {name} slept in a tent | put up the tent
outdoors | {name} warmed up by the campfire | gather dry wood
effort | {name} ran a marathon | train for months
effort | {name} joined the soccer team | try out for the team
photos | {name} took pictures of the wedding | bring a camera
outdoors | {name} built a big snowman | wait for snow to fall
outdoors | {name} skied down the mountain | ride the lift to the top
effort | {name} was allowed to drive a car | get a driver's license
laundry | {name} put on a clean shirt | wash the dirty shirt
movies | {name} watched a movie at the theater | buy a movie ticket
sewing | {name} knitted a warm scarf | get some wool
party | {name} gave a friend a surprise gift | wrap the gift
effort | {name} became a doctor | go to medical school
fire | {name} put out a small kitchen fire | grab a fire extinguisher
bike | {name} rode the repaired bike | fix the broken chain
""")


def _pairs(table: str) -> list[tuple[str, str]]:
    """Read `one/other, one/other, ...`."""
    return [(one, other) for one, other in (pair.split("/") for pair in table.split(", "))]


CONTRASTS = (
    Contrast(
        (
            "Tom lifted the {first} and then the {second} and found that",
            "Ann weighed the {first} and the {second}, and",
        ),
        ("the _ was light", "the _ was heavy"),
        _pairs("feather/anvil, pillow/piano, sponge/boulder, napkin/engine, balloon/refrigerator, leaf/tractor"),
    ),
    Contrast(
        (
            "Lily came near the {first} and the {second} and felt that",
            "As for the {first} and the {second}, of course",
        ),
        ("the _ was cold", "the _ was hot"),
        _pairs("snow/fire, ice/flame, icicle/oven, snowball/stove, freezer/furnace, glacier/lava"),
    ),
    Contrast(
        (
            "Max touched the {first} and the {second} and learned that",
            "Eva lay down on the {first} and the {second}, and",
        ),
        ("the _ was soft", "the _ was hard"),
        _pairs(
            "cushion/rock, mattress/brick floor, pillow/stone, blanket/concrete, sofa/plank, feather bed/bare ground"
        ),
    ),
    Contrast(
        (
            "Zoe tasted the {first} and the {second} and noticed that",
            "The cook tried the {first} and the {second}, and",
        ),
        ("the _ was sweet", "the _ was sour"),
        _pairs(
            "honey/vinegar, candy/lemon, sugar/lime juice, syrup/sauerkraut, chocolate/pickle, caramel/lemon juice"
        ),
    ),
    Contrast(
        (
            "In the race between the {first} and the {second},",
            "Omar watched the {first} and the {second} and saw that",
        ),
        ("the _ was slow", "the _ was fast"),
        _pairs("snail/cheetah, tortoise/horse, tractor/race car, slug/rabbit, rowboat/speedboat, tricycle/motorcycle"),
    ),
    Contrast(
        (
            "Ella drew the {first} and the {second} to show that",
            "Next to each other stood the {first} and the {second};",
        ),
        ("the _ was tiny", "the _ was huge"),
        _pairs("ant/elephant, mouse/whale, pebble/mountain, flea/horse, cottage/skyscraper, canoe/cruise ship"),
    ),
    Contrast(
        (
            "Ben heard the {first} and the {second} and thought that",
            "Of the two sounds, the {first} and the {second},",
        ),
        ("the _ was quiet", "the _ was loud"),
        _pairs("whisper/siren, sigh/thunder, purr/explosion, rustle/scream, soft hum/fire alarm, breeze/jackhammer"),
    ),
    Contrast(
        ("Paul dropped the {first} and the {second}, and", "The {first} and the {second} fell off the shelf, and"),
        ("the _ broke into pieces", "the _ stayed in one piece"),
        _pairs(
            "mirror/towel, wine glass/pillow, light bulb/sock, vase/blanket, china plate/sweater, glass bowl/sponge"
        ),
    ),
    Contrast(
        (
            "Dan picked up the {first} and the {second}, knowing that",
            "The child saw the {first} and the {second}, and",
        ),
        ("the _ was sharp", "the _ was harmless"),
        _pairs("razor/ball, knife/spoon, needle/pillow, dagger/teddy bear, axe/balloon, saw/sponge"),
    ),
    Contrast(
        (
            "June saw the {first} and the {second} in the shop window;",
            "Karl asked for the price of the {first} and the {second}, and",
        ),
        ("the _ was expensive", "the _ was cheap"),
        _pairs("diamond ring/pencil, gold watch/postcard, sports car/eraser, fur coat/candle, piano/plum"),
    ),
    Contrast(
        (
            "Finn put the {first} and the {second} on the table, and soon",
            "The {first} and the {second} lay in the bag until",
        ),
        ("the _ was eaten", "the _ was read"),
        _pairs("sandwich/newspaper, sausage/letter, pizza/novel, apple/magazine, pancake/textbook, cheese/poem"),
    ),
    Contrast(
        ("The farmer owns the {first} and the {second}, and", "In the yard stood the {first} and the {second};"),
        ("the _ was breathing", "the _ was rusting"),
        _pairs("horse/tractor, cow/bucket, goat/truck, dog/shovel, sheep/iron gate, pig/wheelbarrow"),
    ),
    Contrast(
        (
            "The {first} and the {second} fell into the pond, and",
            "Ruth threw the {first} and the {second} into the water, and",
        ),
        ("the _ floated", "the _ sank"),
        _pairs("cork/rock, feather/coin, leaf/brick, wooden stick/anvil, beach ball/hammer, straw/cannonball"),
    ),
    Contrast(
        (
            "In the village, the {first} and the {second} were friends, and",
            "When the {first} and the {second} went to work,",
        ),
        ("the _ helped sick people", "the _ made things to eat"),
        _pairs("doctor/baker, nurse/cook, surgeon/pastry chef, paramedic/butcher"),
    ),
    Contrast(
        (
            "At night, Sara looked at the {first} and the {second};",
            "After sunset, there were the {first} and the {second}, and",
        ),
        ("the _ was shining", "the _ was dark"),
        _pairs("lamp/cave, moon/tunnel, star/cellar, candle/coal mine, lighthouse/dungeon, flashlight/pit"),
    ),
    Contrast(
        ("Gail held a match to the {first} and the {second};", "The fire reached the {first} and the {second}, and"),
        ("the _ burned at once", "the _ did not burn"),
        _pairs("paper/stone, straw/brick, firewood/gravel, cardboard/concrete, hay/sand, newspaper/marble slab"),
    ),
    Contrast(
        ("Hugo put on the {first} and the {second};", "When it snowed, Mary wore the {first} and the {second}, and"),
        ("the _ kept both feet warm", "the _ kept the head warm"),
        _pairs("pair of socks/hat, pair of boots/cap, pair of slippers/hood, pair of stockings/fur hat"),
    ),
    Contrast(
        ("Two friends own the {first} and the {second};", "Ada took a picture of the {first} and the {second};"),
        ("the _ travels by air", "the _ travels by sea"),
        _pairs("airplane/ship, helicopter/sailboat, jet/submarine, glider/ferry, hot-air balloon/canoe"),
    ),
)
