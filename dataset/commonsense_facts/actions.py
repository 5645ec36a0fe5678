"""How everyday jobs are done, and how everyday activities go on."""

from typing import NamedTuple

from .tables import read_rows


class Goal(NamedTuple):
    """Something to do and a sensible way to do it, which fits no goal of another topic."""

    topic: str
    goal: str
    solution: str


class Activity(NamedTuple):
    """The start of a scene and how it goes on, which fits no scene of another topic.

    `{person}` and `{pronoun}` stand for who acts ("A woman", "She").
    """

    topic: str
    name: str
    context: str
    ending: str


# topic | goal | solution
GOALS = [
    Goal(*row)
    for row in read_rows("""
desk | slice a loaf of bread | Saw through it with a bread knife.
desk | cut a sheet of paper in half | Use a pair of scissors along the fold.
desk | cut a wooden board in two | Saw along a pencil line with a handsaw.
desk | trim a hedge | Clip the long twigs with garden shears.
desk | cut down a dead tree | Use a chainsaw close to the ground.
desk | shorten long grass on a lawn | Push a lawn mower over it.
desk | peel a potato | Scrape off the skin with a peeler.
desk | grate cheese for pasta | Rub the block against a metal grater.
fastening | hang a picture on a wall | Hammer a nail in and hook the frame on it.
fastening | join two planks firmly | Drive screws through both of them.
fastening | keep a stack of papers together | Put a staple in the corner.
fastening | close a cardboard box for the mail | Seal the flaps with packing tape.
fastening | stop a shoe from slipping off | Tie the laces in a tight bow.
fastening | put a button back on a shirt | Sew it on with a needle and thread.
fastening | mend a broken teacup | Glue the pieces back together.
fastening | attach a poster to a cork board | Pin its corners with thumbtacks.
cleaning | clean greasy dinner plates | Wash them with dish soap and hot water.
cleaning | clean muddy clothes | Put them in the washing machine with detergent.
cleaning | wash dirty hands | Rub them with soap under the tap.
cleaning | get dust off a carpet | Run the vacuum cleaner over it.
cleaning | clean a smudged window | Spray it with glass cleaner and wipe it.
cleaning | clean your teeth at night | Brush them with toothpaste.
cleaning | wash a dirty car | Sponge it down with soapy water from a bucket.
cleaning | clean a dusty shelf | Wipe it with a damp cloth.
cleaning | get shampoo out of your hair | Rinse it under the shower.
cleaning | dry wet hair quickly | Blow warm air on it with a hair dryer.
cleaning | dry wet laundry on a sunny day | Hang it on a clothesline outside.
cleaning | dry yourself after a swim | Rub your skin with a towel.
cleaning | soak up spilled milk | Lay paper towels on the puddle.
temperature | boil an egg | Put it in bubbling water for some minutes.
temperature | warm up cold soup | Heat it in a pot on the stove.
temperature | toast a slice of bread | Drop it into the toaster and press the lever.
temperature | bake a batch of cookies | Leave them in a hot oven until golden.
temperature | fry an egg | Crack it into a hot, buttered pan.
temperature | make popcorn | Heat the corn kernels until they burst.
temperature | melt a bar of chocolate | Stir it in a bowl over hot water.
temperature | make a cup of tea | Pour boiling water over a tea bag.
temperature | cook spaghetti | Drop it into a pot of boiling, salted water.
temperature | make ice cubes | Fill a tray with water and freeze it.
temperature | keep milk from going sour | Store it in the refrigerator.
temperature | keep drinks cold at a picnic | Pack them in a cooler with ice.
temperature | cool down on a hot day | Sit in the shade in front of a fan.
temperature | keep ice cream from melting | Store it in the freezer.
home | see in a dark cellar | Switch on a flashlight.
home | read in bed at night | Turn on the bedside lamp.
home | light candles on a cake | Touch each wick with a burning match.
home | make a room brighter in the morning | Pull the curtains open.
home | fix a lamp with a burned-out bulb | Screw in a new bulb.
gardening | grow a sunflower | Plant a seed in soil and water it.
gardening | help a wilting house plant | Give it some water.
gardening | get rid of weeds in a flower bed | Pull them up by the roots.
gardening | gather fallen leaves in the yard | Rake them into a pile.
gardening | dig a hole for a small tree | Push a spade into the ground and lift out the soil.
gardening | pick apples from a high branch | Climb a ladder with a basket.
gardening | plant tulip bulbs | Bury them in the flower bed in the fall.
temperature | keep your hands warm in the snow | Wear thick gloves.
temperature | stay dry while walking in the rain | Open an umbrella.
temperature | keep your neck warm in winter | Wrap a wool scarf around it.
temperature | keep your feet dry in puddles | Wear rubber boots.
temperature | stay warm in bed on a cold night | Pull up an extra blanket.
temperature | protect your eyes from bright sun | Put on sunglasses.
temperature | avoid a sunburn at the beach | Rub sunscreen on your skin.
desk | find out how long a table is | Stretch a tape measure along it.
desk | find out how heavy you are | Stand on a bathroom scale.
desk | check for a fever | Hold a thermometer under the tongue.
desk | time a race | Start and stop a stopwatch.
desk | measure flour for a cake | Fill a measuring cup to the line.
desk | find north on a hike | Look at the needle of a compass.
desk | learn what day of the month it is | Look at a calendar.
animals | feed a hungry cat | Fill its bowl with cat food.
animals | take a dog for a walk | Clip a leash to its collar.
animals | attract birds to the garden | Hang up a feeder full of seeds.
animals | keep a horse healthy | Give it hay, water and room to run.
animals | move a fish to a new tank | Scoop it up gently with a small net.
cleaning | clean a rabbit hutch | Replace the old straw with fresh straw.
desk | send a letter to a friend | Put it in a stamped envelope and mail it.
desk | fix a spelling mistake made in pencil | Rub it out with an eraser.
desk | sharpen a blunt pencil | Turn it inside a pencil sharpener.
desk | draw a straight line | Run a pencil along a ruler.
desk | draw a perfect circle on paper | Swing a compass pencil around its point.
desk | remember the groceries | Write a shopping list.
desk | mark your place in a book | Slip a bookmark between the pages.
desk | learn what a hard word means | Look it up in a dictionary.
health | treat a small cut on a finger | Clean it and put on a bandage.
health | help a sore throat | Sip warm tea with honey.
health | protect your head while cycling | Buckle on a helmet.
health | get help in a medical emergency | Call an ambulance.
health | stay safe in a moving car | Fasten the seat belt.
health | soothe a bumped knee | Hold an ice pack against the bruise.
health | get fit and strong | Exercise several times a week.
health | fall asleep more easily | Lie down in a quiet, dark bedroom.
travel | cross a wide river without a bridge | Take the ferry to the other bank.
travel | get to another continent fast | Buy a ticket and fly there.
travel | fix a flat bicycle tire | Patch the hole and pump in air.
travel | get a car to run when the tank is empty | Fill it up at a gas station.
travel | carry clothes on a long trip | Pack them in a suitcase.
desk | find the way in an unknown city | Follow the streets on a map.
travel | cross a busy street safely | Wait for the green light at the crosswalk.
travel | go down a snowy slope for fun | Ride on a sled.
locks | keep strangers out of the house | Lock the front door.
locks | open a locked door | Turn the right key in the keyhole.
locks | keep a bicycle from being stolen | Chain it to a rack.
locks | protect an online account | Choose a long, secret password.
locks | keep valuables safe at home | Shut them in a steel safe.
home | change the color of a bedroom wall | Roll fresh paint onto it.
home | get green paint from two other colors | Mix blue and yellow.
home | clean a brush after using watercolors | Swish it in a jar of water.
home | keep paint off the floor | Spread old newspapers under the work.
home | decorate eggs for Easter | Dip them in dye.
health | wake up at six in the morning | Set an alarm clock.
health | make a quiet song louder | Turn up the volume.
health | block out noise while studying | Put in earplugs.
health | get a referee's call noticed | Blow hard on a whistle.
health | play a tune on a piano | Press the keys in the right order.
""")
]

# topic | activity | context | ending
ACTIVITIES = [
    Activity(*row)
    for row in read_rows("""
food | Making tea | {person} drops a tea bag into a mug. {pronoun} | pours in hot water from the kettle.
food | Making coffee | {person} grinds some coffee beans. {pronoun} | puts the fresh coffee into the filter.
food | Making lemonade | {person} squeezes lemons into a jug. {pronoun} | stirs in water and plenty of sugar.
food | Making orange juice | {person} cuts oranges in half. {pronoun} | presses out the juice into a glass.
food | Baking a cake | {person} mixes flour, eggs and sugar. {pronoun} | puts the batter into the oven.
food | Baking bread | {person} kneads a ball of dough. {pronoun} | lets the dough rise in a warm place.
food | Making pancakes | {person} pours batter into a hot pan. {pronoun} | flips the pancake when it is brown.
food | Making pizza | {person} spreads tomato sauce on the dough. {pronoun} | sprinkles grated cheese over the sauce.
food | Decorating a cake | {person} fills a bag with icing. {pronoun} | squeezes icing flowers onto the cake.
washing | Ironing | {person} lays a shirt on the ironing board. {pronoun} | presses out the creases with a hot iron.
washing | Doing laundry | {person} loads clothes into the washer. {pronoun} | adds detergent and starts the wash.
washing | Hanging out laundry | {person} carries wet shirts outside. {pronoun} | pegs the shirts on the clothesline.
washing | Folding clothes | {person} takes dry towels from the dryer. {pronoun} | folds the towels into a neat pile.
washing | Washing dishes | {person} fills the sink with soapy water. {pronoun} | scrubs the dirty plates with a sponge.
washing | Mopping the floor | {person} dips a mop into a bucket. {pronoun} | wipes the kitchen floor from wall to wall.
washing | Washing windows | {person} sprays cleaner on the glass. {pronoun} | wipes the window until it shines.
washing | Sweeping | {person} takes a broom from the closet. {pronoun} | sweeps the dust into a dustpan.
washing | Vacuuming | {person} plugs in the vacuum cleaner. {pronoun} | pushes it back and forth over the rug.
hair | Cutting hair | {person} combs a customer's hair. {pronoun} | snips off the ends with scissors.
washing | Washing hair | {person} rubs shampoo into wet hair. {pronoun} | rinses out the foam under the shower.
hair | Shaving a beard | A barber spreads foam on a man's cheeks. The barber | pulls a razor over the foam.
hair | Braiding hair | {person} parts a girl's hair into three strands. {pronoun} | braids the strands and ties the
    end.
outdoors | Swimming laps | {person} dives into the pool. {pronoun} | swims to the far end and turns around.
outdoors | High diving | {person} climbs to the top diving board. {pronoun} | jumps and splashes into the pool below.
outdoors | Surfing | {person} paddles out on a surfboard. {pronoun} | stands up on the board and rides a wave.
outdoors | Snorkeling | {person} puts on a mask and snorkel in the sea. {pronoun} | looks at colorful fish under
    the water.
outdoors | Playing basketball | {person} dribbles toward the hoop. {pronoun} | shoots the ball through the basket.
outdoors | Playing soccer | {person} runs up the field with the ball. {pronoun} | kicks the ball into the goal.
outdoors | Playing tennis | {person} throws the ball up to serve. {pronoun} | hits the ball over the net with a racket.
outdoors | Bowling | {person} rolls a heavy ball down the lane. {pronoun} | watches the ball knock over the pins.
outdoors | Playing golf | {person} sets a ball on the tee. {pronoun} | swings the club and hits the ball far away.
outdoors | Playing baseball | {person} steps up to bat. {pronoun} | hits the pitch and runs to first base.
outdoors | Playing volleyball | {person} waits near the volleyball net. {pronoun} | leaps up and spikes the ball
    over the net.
outdoors | Skiing | {person} gets off the ski lift. {pronoun} | skis down the snowy slope.
outdoors | Building a snowman | {person} rolls three big balls of snow. {pronoun} | stacks them and adds a carrot nose.
outdoors | Sledding | {person} drags a sled up a snowy hill. {pronoun} | sits down and slides to the bottom.
outdoors | Shoveling snow | {person} finds the driveway deep in snow. {pronoun} | shovels the snow to the side.
outdoors | Ice skating | {person} laces up a pair of ice skates. {pronoun} | glides across the frozen rink.
garden | Planting flowers | {person} digs small holes in the soil. {pronoun} | sets a young flower into each hole.
garden | Mowing the lawn | {person} starts the lawn mower. {pronoun} | walks behind it, cutting the tall grass.
garden | Watering plants | {person} fills a watering can. {pronoun} | waters the tomato plants one by one.
garden | Raking leaves | {person} sees dead leaves all over the lawn. {pronoun} | rakes the leaves into a big heap.
garden | Picking apples | {person} leans a ladder on an apple tree. {pronoun} | climbs up and picks the ripe apples.
music | Playing the piano | {person} sits down at the piano. {pronoun} | plays a melody on the keys.
music | Playing the guitar | {person} tunes a guitar. {pronoun} | strums the strings and plays a song.
music | Playing the drums | {person} picks up two drumsticks. {pronoun} | beats out a rhythm on the drums.
music | Playing the violin | {person} lifts a violin to the chin. {pronoun} | draws the bow across the strings.
music | Singing | {person} walks up to the microphone. {pronoun} | sings a song for the audience.
art | Painting a portrait | {person} sets a canvas on an easel. {pronoun} | paints a face on the canvas.
art | Painting a wall | {person} dips a roller into a tray of paint. {pronoun} | rolls the paint onto the wall.
art | Drawing | {person} opens a sketchbook. {pronoun} | draws a picture with a pencil.
art | Face painting | {person} dips a brush into face paint. {pronoun} | paints cat whiskers on a child's cheeks.
cars | Changing a tire | {person} lifts the car with a jack. {pronoun} | takes off the flat tire.
washing | Washing a car | {person} sprays the car with a hose. {pronoun} | rubs the hood with a soapy sponge.
cars | Getting gas | {person} parks next to the gas pump. {pronoun} | fills the tank of the car.
cars | Parking | {person} finds an empty parking space. {pronoun} | backs the car in and turns off the engine.
pets | Walking a dog | {person} clips a leash on a dog. {pronoun} | leads the dog out for a walk.
washing | Bathing a dog | {person} puts a muddy dog in the tub. {pronoun} | washes the dog's fur with shampoo.
pets | Feeding a cat | {person} opens a can of cat food. {pronoun} | spoons the food into the cat's bowl.
pets | Riding a horse | {person} puts a saddle on a horse. {pronoun} | climbs on and rides along the trail.
pets | Playing fetch | {person} throws a stick for a dog. {pronoun} | waits for the dog to bring the stick back.
outdoors | Fishing | {person} casts a fishing line into the lake. {pronoun} | feels a tug and reels in a trout.
outdoors | Ice fishing | {person} cuts a hole in the frozen lake. {pronoun} | lowers a baited hook into the hole.
outdoors | Rowing a boat | {person} steps into a rowboat with two oars. {pronoun} | rows slowly across the lake.
outdoors | Canoeing | {person} pushes a canoe off the bank. {pronoun} | paddles down the river.
outdoors | Pitching a tent | {person} unrolls a tent at the campsite. {pronoun} | hammers the tent pegs into the
    ground.
outdoors | Building a campfire | {person} piles up dry sticks and logs. {pronoun} | lights the sticks with a match.
outdoors | Roasting marshmallows | {person} puts a marshmallow on a stick. {pronoun} | holds the marshmallow over
    the campfire.
outdoors | Hiking | {person} puts on boots and a backpack. {pronoun} | hikes up the trail to the summit.
outdoors | Lifting weights | {person} grips a heavy barbell. {pronoun} | lifts the barbell up to the chest.
outdoors | Running a race | {person} hears the starting gun. {pronoun} | sprints down the track to the finish line.
outdoors | Doing push-ups | {person} lies face down on the gym mat. {pronoun} | pushes up and down with both arms.
outdoors | Jumping rope | {person} holds both ends of a jump rope. {pronoun} | swings the rope and hops over it.
outdoors | Doing yoga | {person} unrolls a yoga mat. {pronoun} | stretches slowly into a yoga pose.
office | Sending a letter | {person} folds a letter and licks a stamp. {pronoun} | drops the letter into the mailbox.
office | Writing an email | {person} opens a new email. {pronoun} | types the message and clicks send.
office | Making copies | {person} lays a page on the copier. {pronoun} | presses the button to print the copies.
office | Answering the phone | {person} hears the phone ring. {pronoun} | picks it up and says hello.
sewing | Sewing | {person} threads a needle. {pronoun} | stitches up the hole in the sock.
sewing | Knitting | {person} picks up a ball of wool and two needles. {pronoun} | knits a few rows of a scarf.
sewing | Wrapping a present | {person} lays a gift on wrapping paper. {pronoun} | folds the paper over and ties a
    ribbon.
sewing | Sewing on a button | {person} finds a loose button on a coat. {pronoun} | sews the button on with strong
    thread.
teeth | Brushing teeth | {person} squeezes toothpaste on a brush. {pronoun} | brushes every tooth and spits.
teeth | Visiting the dentist | {person} sits in the dentist's chair. {pronoun} | opens wide to show the sore tooth.
teeth | Flossing | {person} pulls out a piece of dental floss. {pronoun} | slides the floss between two teeth.
shopping | Buying groceries | {person} pushes a cart through the supermarket. {pronoun} | pays for the food at the
    checkout.
shopping | Trying on clothes | {person} takes a jacket to the fitting room. {pronoun} | tries the jacket on in
    front of a mirror.
shopping | Paying | {person} reaches the cashier at the shop. {pronoun} | hands over the money and takes the receipt.
reading | Reading a story | {person} opens a book at bedtime. {pronoun} | reads the children a fairy tale.
reading | Visiting a library | {person} finds a good book on a shelf. {pronoun} | takes it to the desk to borrow it.
reading | Studying | {person} has a history exam tomorrow. {pronoun} | reads the chapter again and takes notes.
food | Making a salad | {person} washes some lettuce. {pronoun} | tosses the leaves with oil and vinegar.
food | Chopping vegetables | {person} puts a carrot on the cutting board. {pronoun} | chops the carrot into thin
    slices.
food | Peeling potatoes | {person} takes a potato from the bag. {pronoun} | peels off the brown skin.
repairs | Hanging a picture | {person} hammers a nail into the wall. {pronoun} | hangs the frame on the nail.
repairs | Building a shelf | {person} measures a plank and marks it. {pronoun} | saws the plank along the mark.
repairs | Changing a light bulb | {person} climbs up to the dead light bulb. {pronoun} | screws in a new bulb.
repairs | Fixing a leak | {person} finds a dripping pipe. {pronoun} | tightens the pipe joint with a wrench.
birthday | Blowing out candles | {person} bends over a birthday cake. {pronoun} | makes a wish and blows out the
    candles.
birthday | Opening presents | {person} gets a big box with a ribbon. {pronoun} | tears off the paper to see the gift.
birthday | Blowing up balloons | {person} holds a balloon to the lips. {pronoun} | blows until the balloon is big
    and round.
""")
]
