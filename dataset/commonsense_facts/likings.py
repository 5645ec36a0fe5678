"""What nearly everybody likes, and what nearly nobody does."""

QUESTIONS = (
    "do most people enjoy {thing}",
    "would you be glad about {thing}",
    "is {thing} a pleasant thing",
    "does {thing} make a person happy",
    "do people hope for {thing}",
    "is {thing} something to look forward to",
    "would most people smile about {thing}",
    "is {thing} nice to have",
)


def _things(table: str) -> list[str]:
    return table.strip().replace("\n", "; ").split("; ")


LIKED = _things("""
a birthday present; a warm hug; a sunny holiday; a delicious cake; a kind friend; a lovely song; a first prize
a funny joke; a beautiful garden; a free ice cream; a happy family; a good night's sleep; a day at the beach
a clean, soft bed; a cozy fireplace; a compliment; a picnic in the park; a bowl of fresh strawberries
a hot shower after a hike; a puppy that licks your hand; a pay raise; a safe journey home; a surprise party
a good grade; a gentle massage; a rainbow after the storm; a helpful neighbor; a shiny new bicycle; a wedding party
a cool drink on a hot day; a smile from a friend; a comfortable chair; a bouquet of flowers; a tasty dinner
a trip to the zoo; a thank-you card; a winning goal; a fun game; a day off; a sweet, ripe melon
an exciting adventure; a letter from a good friend; a box of fine chocolates; a bright and cheerful room
a successful exam; a warm welcome; a healthy baby; an interesting book; a peaceful evening by the lake
a fresh loaf of bread; a ride on a carousel; a view from the mountain top; a caring grandmother; a fair deal
a quick recovery; a loving home; a visit to the theater; an honest apology; a brand-new pair of shoes
a big round of applause; a juicy peach; a playful kitten; a relaxing bath; a loyal companion; a job well done
a lucky find; a stroll through a blooming meadow; an unexpected gift; a free weekend; a friendly teacher
a delightful concert; a dream come true; a perfect summer day; a cup of hot cocoa; a gold medal; a good laugh
a generous tip; a sweet lullaby; a swim in a clear lake; a pretty sunset; a favorite meal; a full piggy bank
a merry feast; a wise and patient friend; a soft blanket; a well-earned rest; a magical evening; a hearty breakfast
an easy victory; a snug sweater in winter; a promotion at work; a happy ending; a joyful reunion; a scholarship
a tidy kitchen; a lively dance; a treasured keepsake; a slice of warm apple pie; a bag of sweet cherries
""")

DISLIKED = _things("""
a broken leg; a toothache; a stolen wallet; a house fire; a rude insult; a nasty bee sting; a car crash; a rotten fish
a dirty toilet; a scary nightmare; a bad grade; a flat tire; a lost passport; a case of food poisoning
a terrible headache; a leaking roof; a flooded basement; a painful burn; a bitter quarrel; a moldy sandwich
a dead battery; a robbery; a sprained ankle; an empty fridge; a snake bite; a cruel lie; a long traffic jam
a high fever; a lonely birthday; a spoiled dinner; a canceled vacation; a parking ticket; an earthquake
a broken window; a painful fall; a cold, wet tent; a screaming alarm at night; a torn dress; a boring speech
a smelly sock; a swarm of mosquitoes; a shameful defeat; a plate of burnt food; a deep cut in the finger
a vicious dog; a serious illness; a crashed computer; a heavy fine; a missed flight; a bleeding nose
an angry neighbor; a leaking pen in the pocket; a rat in the kitchen; an ugly stain on a new shirt; a black eye
a sleepless night; a failed exam; a bitter disappointment; a nasty rumor; a sore throat; a stinking garbage can
a jammed door; a shattered phone; a dangerous gas leak; a sad farewell; a lost suitcase; a broken promise
a bad cold; a poisoned well; a stubborn rash; a bully at school; a crop killed by frost; a horrible smell
a plane that is late by nine hours; a tax bill that is far too high; an unfair punishment; a sunburned back
a collapsed bridge; a mean trick; a power cut in winter; a wasp in the tent; a cracked tooth; a bankrupt company
a stomach ache; a miserable rainy camp; a dreadful accident; a hungry night; a bitten tongue; a war
a lump of sour, spoiled milk; a blister on the heel; a faulty brake; a thief in the house; a violent storm
a cruel master; a bitter medicine; a broken heart; a muddy carpet; an infected wound; a threatening letter
""")
