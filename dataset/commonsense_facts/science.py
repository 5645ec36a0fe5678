"""School science: situations, each with the one right name for what it shows."""

from typing import NamedTuple

from .tables import read_groups


class Topic(NamedTuple):
    """Situations that all lead to the same questions.

    Attributes:
        questions: Ways to ask about a `{case}`.
        answers: The cases of each answer; a case fits its own answer and clearly no other.
    """

    questions: tuple[str, str]
    answers: dict[str, list[str]]


TOPICS = (
    Topic(
        ("A student wants to know {case}. Which tool should be used?", "Which instrument would show {case}?"),
        read_groups(
            """
a thermometer: how warm the bath water is; whether a patient has a fever; how cold it is outdoors
a ruler: how long a pencil is; how wide a book is; the length of a caterpillar in inches
a balance scale: the mass of a rock; which of two apples is heavier; how heavy a bag of sugar is
a stopwatch: how many seconds a race takes; how long a swing needs for one swing; how quickly a runner finishes a lap
a microscope: what a single cell looks like; what bacteria look like; the tiny parts of a drop of pond water
a telescope: what the rings of Saturn look like; what the craters of the moon look like; the shape of a faraway galaxy
a compass: which direction is north; whether a hiker is walking east or west
a rain gauge: how much rain fell last night; how many inches of rain a storm brought
a wind vane: from which direction the wind blows; whether the wind comes from the west
""",
            "; ",
        ),
    ),
    Topic(
        ("{case}. Which change is this?", "{case}. What is this process called?"),
        read_groups(
            """
melting: An ice cube turns into a puddle; Butter becomes liquid in a hot pan; A snowman shrinks on a warm day;
    Candle wax near the flame turns soft and runs
freezing: Lake water turns into solid ice in winter; Juice in a tray becomes hard popsicles; Rain turns to ice on a
    cold windshield
evaporation: A puddle slowly disappears in the sun; Wet clothes dry on a line; The water level of an open fish tank
    drops day by day
condensation: Drops of water form on a cold glass of lemonade; A bathroom mirror fogs up during a hot shower; Dew
    forms on cool grass at dawn
burning: A log in the campfire turns into ash and smoke; A match head flares up and turns black
rusting: An old iron nail gets a flaky red coat; A wet bicycle chain slowly turns reddish brown
dissolving: Sugar disappears when stirred into tea; Salt vanishes in a glass of water
""",
            "; ",
        ),
    ),
    Topic(
        ("Which organ of the body {case}?", "Which part of the body {case}?"),
        read_groups(
            """
the heart: pumps blood through the body; beats faster during a run; pushes blood into the arteries
the lungs: takes oxygen from the air; fills with air when a person breathes in
the stomach: breaks down food after it is swallowed; mixes swallowed food with acid
the brain: controls thinking and memory; sends signals to all the nerves
the skin: covers the whole body; makes sweat to cool a person down; keeps germs out like a wall
the eyes: reacts to light so that a person can see; lets a person read a page
the ears: picks up sounds; lets a person hear music
the teeth: bites and chews food; is harmed by sugar and needs brushing
the bones: makes up the skeleton; holds the body up and can break in a fall
""",
            "; ",
        ),
    ),
    Topic(
        ("{case}. Which force causes this?", "{case}. What is mainly responsible?"),
        read_groups(
            """
gravity: An apple falls from a tree to the ground; A ball thrown up comes back down; A skydiver falls toward the
    earth; Water runs down a hill
friction: Rubbing two hands together warms them; Brake pads slow down a bicycle wheel; A rolling ball slows down on
    a rough carpet; Shoe soles grip the sidewalk
magnetism: A compass needle turns to the north; A steel paper clip jumps to a horseshoe magnet; Two bar magnets
    push each other away
electricity: A wire carries current to a lamp; A bulb lights up when a battery is connected; A phone charges at a
    wall socket
wind: A kite stays up in the sky; A sailboat is pushed over the lake; The blades of a windmill turn
""",
            "; ",
        ),
    ),
    Topic(
        ("{case}. Which natural event is this?", "{case}. What has most likely happened?"),
        read_groups(
            """
an earthquake: The ground shakes and buildings sway; Rocks slip along a fault and the land trembles; Seismographs
    all over the region record shaking
a volcanic eruption: Lava and ash pour out of a mountain; Melted rock flows from a crater
a flood: A river rises over its banks and fills the streets; After days of rain, cellars fill with water
a drought: No rain falls for months and the fields dry out; Crops die and wells run dry for lack of rain
a tornado: A funnel of spinning air tears off roofs; A twisting column of wind crosses the plain
an avalanche: A mass of snow slides down a mountain; Skiers are buried by sliding snow
a lightning strike: A flash from a storm cloud splits a tree; A bright bolt from the clouds sets a barn on fire
an eclipse: The moon passes in front of the sun; The earth's shadow makes the full moon dark
""",
            "; ",
        ),
    ),
    Topic(
        ("Which part of a plant {case}?", "Students study a plant. Which part {case}?"),
        read_groups(
            """
the roots: takes up water from the soil; holds the plant in the ground
the leaves: uses sunlight to make food; is green and turns toward the light
the flowers: attracts bees with bright colors; has petals and makes pollen
the seeds: can sprout into a new plant; is sown by a farmer in spring
the bark: protects the trunk of a tree; forms the rough outside of a tree
""",
            "; ",
        ),
    ),
    Topic(
        ("What does a scientist study who {case}?", "A scientist {case}. What is her subject?"),
        read_groups(
            """
plants: works as a botanist; compares mosses, ferns and trees; looks at leaves and roots
animals: works as a zoologist; watches lions and zebras; counts wolves and bears
the stars: works as an astronomer; looks at distant suns through a telescope
rocks: works as a geologist; collects granite and marble; maps layers of stone
the weather: works as a meteorologist; forecasts storms; tracks hurricanes and cold fronts
diseases: looks for new vaccines; finds out how the flu spreads
ancient life: digs up dinosaur bones; compares fossils of extinct creatures
""",
            "; ",
        ),
    ),
    Topic(
        ("To which group does an animal belong that {case}?", "An animal {case}. To which group does it belong?"),
        read_groups(
            """
mammals: feeds milk to its young; has hair and nurses its babies
birds: has feathers and a beak; grows feathers and hatches from a hard-shelled egg in a nest
fish: breathes with gills all its life and has fins; swims with fins and scales and never breathes air
insects: has six legs and three body parts; has six legs and two antennae
reptiles: has dry scales and basks in the sun; has a dry, scaly skin and crawls on land like a lizard
amphibians: starts as a tadpole and later hops on land; has moist skin and grows from a tadpole
""",
            "; ",
        ),
    ),
    Topic(
        ("{case}. What is the main source of energy?", "{case}. Where does the energy come from?"),
        read_groups(
            """
sunlight: Solar panels make power on a roof; A green leaf makes sugar; A rooftop tank heats water on clear days
moving water: A dam on a river makes power; A mill wheel turns in a stream
moving air: Tall turbines with three blades spin on a hill; A sailing ship crosses the sea
food: A child runs around the playground; A horse pulls a cart; A cyclist climbs a hill
a battery: A flashlight shines in the dark; A remote control works without a cord; A wristwatch ticks for years
gasoline: A car engine runs; A chainsaw motor roars; A motorcycle speeds along the road
""",
            "; ",
        ),
    ),
    Topic(
        ("Which object in space {case}?", "In an astronomy lesson, which object {case}?"),
        read_groups(
            """
the sun: gives the earth light and heat; is the star closest to us; is at the center of our solar system
the moon: circles the earth about once a month; causes the ocean tides; was visited by astronauts in 1969
the earth: is the planet on which people live; has oceans of liquid water and forests
a comet: has a long glowing tail of gas and dust; is a ball of ice that grows a tail near the sun
a galaxy: contains billions of stars; is a huge system of stars such as the Milky Way
""",
            "; ",
        ),
    ),
    Topic(
        ("Which feature helps an animal to {case}?", "An animal has to {case}. What helps it most?"),
        read_groups(
            """
thick fur: stay warm in the Arctic; keep out the cold of a snowy winter
webbed feet: paddle through a pond; push against water while swimming
sharp claws: dig for prey and hold it fast; climb up tree bark
a hard shell: keep its soft body safe from bites; hide inside its own armor
a long neck: reach leaves at the top of tall trees; eat from branches high above the ground
large ears: hear faint sounds at night; notice an enemy by its quiet steps
strong wings: fly over long distances; travel south through the air in fall
skin colors like its surroundings: stay hidden among leaves; be hard to see on tree bark
""",
            "; ",
        ),
    ),
    Topic(
        ("What does {case} do?", "A class learns about {case}. What does it do?"),
        read_groups(
            """
It makes its own food.: a green plant; a leafy oak tree; grass in a sunny field
It hunts other animals.: a lion near a herd of zebras; a hawk circling over mice; a wolf following a deer
It breaks down dead matter.: a mushroom on a rotting log; the mold on old bread; an earthworm in a compost heap
It spreads pollen.: a bee going from flower to flower; a butterfly drinking nectar; a hummingbird at a blossom
It spins a web.: a garden spider waiting for flies; an orb weaver above the window
""",
            "; ",
        ),
    ),
)
