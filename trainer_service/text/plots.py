"""The words and plots of the built-in stories.

A plot is a list of beats of one or two sentences. `[a|b]` is a choice between a and b; it may be empty or nested.
`{h}` is the hero, `{f}` a friend, `{g}` a grown-up of the hero's family, `{w}` a wise stranger, `{x}` a small animal,
`{o}` and `{o2}` things, `{p}` a place, `{s}`, `{s2}` and `{s3}` spots outside, `{c}` a colour.
"""

GIRLS = (
    "Lily Mia Anna Rosie Sue Ella Nora Ruby Zoe Lucy Clara Daisy Molly Ivy Hazel Emma "
    "Sophie Alice Julia Grace Maria Hannah Olivia Nina"
)
BOYS = (
    "Tom Ben Max Sam Leo Jack Tim Finn Oscar Noah Henry Theo Billy Adam Ned Luke "
    "Peter Jacob David Simon Martin Oliver Paul Hugo"
)
PETS = (
    "Pip Rusty Bella Coco Fluffy Biscuit Poppy Dot Button Honey Bramble Nutmeg Pebble Willow Maple Tumble "
    "Ginger Pepper Cinnamon Waffle Muffin Clover Whiskers Patches"
)
ANIMALS = (
    "rabbit fox bear mouse squirrel duck puppy kitten hedgehog frog deer lamb pony badger otter turtle "
    "raccoon penguin monkey panda elephant piglet"
)
SIZES = ["little", "small", "young"]
FAMILY = [("mother", "she"), ("father", "he"), ("grandmother", "she"), ("grandfather", "he"), ("aunt", "she")]
WISE = "owl crow goat horse tortoise beaver goose heron"
SMALL_ANIMALS = "bird butterfly bee chick ladybug sparrow robin moth"
COLOURS = "red blue green yellow pink purple orange white brown golden"
THINGS = (
    "ball kite drum hat scarf book bell whistle ribbon basket blanket lantern boat doll marble feather "
    "bucket balloon crayon button flute puppet pencil wagon trumpet pillow necklace mitten bracelet"
)
PLACES = [
    ("to the park", "in the park"),
    ("to the forest", "in the forest"),
    ("to the meadow", "in the meadow"),
    ("to the garden", "in the garden"),
    ("to the big hill", "on the big hill"),
    ("to the lake", "by the lake"),
    ("to the farm", "at the farm"),
    ("to the river", "by the river"),
    ("to the old mill", "near the old mill"),
    ("to the orchard", "in the orchard"),
]
SPOTS = [
    "behind a big tree",
    "under a bush",
    "next to a gray rock",
    "in the tall grass",
    "under a wooden bench",
    "between two logs",
    "under a pile of leaves",
    "inside an empty box",
    "behind the fence",
    "near an old well",
    "under a stone bridge",
    "beside the gate",
]

OPENINGS = [
    "[Once upon a time|Long ago|Once], there [was|lived] {h.a_kind} named {h}.",
    "[Once upon a time|Long ago], {h.a_kind} named {h} lived in [a cozy house|a small village|a house with a {c} door|"
    "a quiet town|a cottage near the woods].",
    "{h} was {h.a_kind} who lived [near the sea|on a farm|in a small town|at the edge of a forest|in a {c} house].",
    "There was once {h.a_kind} whose name was {h}.",
    "In a [small|quiet|pretty] [village|town|valley], there lived {h.a_kind} named {h}.",
]

TRAITS = [
    "{h.he} was [very|always] "
    "[kind|brave|curious|shy|cheerful|clever|gentle|playful|polite|careful|honest|thoughtful|lively|quiet].",
    "{h.he} loved to [sing|dance|sing funny songs|draw pictures|run in the grass|climb trees|count the stars|"
    "look at the clouds|read stories|collect shells|collect shiny stones|tell jokes|jump over puddles|bake biscuits|"
    "catch snowflakes|feed the chickens|paint butterflies|whistle tunes|swing on the swing|make mud pies|visit "
    "neighbors].",
    "{h.he} [always had a warm smile|wore [a tiny {c} bow|soft {c} boots|a {c} coat with big pockets] every day].",
    "everyone [liked|loved] {h} because {h.he} was so [kind|friendly|funny|helpful|cheerful].",
    "",
]

LOST_THING = [
    "{h} had {o.a_kind}, and it was {h.his} favorite toy.",
    "one [sunny|windy|warm|bright] [day|morning|afternoon], {h} took the {o.noun} {p.to}.",
    "{h.he} [played|ran and jumped] all [day|morning|afternoon], but then the {o.noun} was gone.",
    '["Oh no! Where is my {o.noun}?" {h.he} cried.|"My {o.noun} is lost!" said {h}.|{h} felt [very|so] sad.]',
    "{h.he} looked {s}, but [it was not there|there was only {x.a_kind}|{h.he} found only an old shoe].",
    "[then {h.he} looked {s2}, but [it was not there|there was nothing] either.|]",
    "just then, {f} came by. {f} was {f.a_kind}.",
    '[{f} asked, "Why are you [sad|crying], {h}?"|"What is wrong?" asked {f}.] '
    '["I lost my {o}," said {h}.|"I cannot find my {o.noun}," {h} said.]',
    '"[Do not worry|Do not cry]. [I will help you|We can look together|Two can look better than one]," said {f}.',
    "they looked [here and there|everywhere|high and low]. [At last|After a while|Soon], "
    "[{f} saw something {o.colour} {s3}|they found the {o.noun} {s3}].",
    '[{h} [hugged|thanked] {f} and [laughed|smiled].|"You found it! Thank you, {f}!" {h} said.|'
    "{h} was so happy that {h.he} danced.]",
    "[the two friends played with the {o.noun} until the sun went down.|from that day on, they [shared|played with] "
    "the "
    "{o.noun} [every day|together].|after that, {h} always took good care of the {o.noun}.]",
]

STUCK_ANIMAL = [
    "one [sunny|quiet|cool|bright] [day|morning], {h} was walking {p.at} when {h.he} heard a [tiny|small|sad] "
    "[sound|voice].",
    '["Help! Help!" someone called.|it came from {s}.|{h.he} stopped and listened.]',
    "{h} saw {x.a_kind} that was stuck [in the mud|in a spider web|under a heavy branch|in a deep hole|in a thorny "
    "bush].",
    '["Please help me," said {x}. "I want to go home."|{x} looked [scared|tired|cold] and could not move.]',
    "{h} tried to [pull|lift|push] with all {h.his} strength, but it was too hard.",
    "so {h.he} ran to find {f}, {f.a_kind}.",
    '"[Come quickly|Please come with me], {f}! {x} needs us," {h} said.',
    "{f} brought [a long stick|a strong rope|a small ladder|a wooden spoon], and they worked together.",
    "[they pulled one time, two times, three times.|they worked slowly and were very gentle.|first nothing happened.] "
    "[Then|At last|Suddenly], {x} was free!",
    '[{x} [jumped|danced] with joy.|"Thank you! You saved me," said {x}.|{x} gave them a happy little smile.]',
    "[the next day, {x} came back with [a sweet berry|a pretty flower|a shiny stone] for each of them.|"
    "{h} and {f} took {x} home to its family.|after that, {x} came to visit them every morning.]",
    "[{h} learned that [friends make hard things easy|it is good to help|small friends are good friends].|"
    "{h} was proud and slept well that night.]",
]

SHARING = [
    "one [morning|day|afternoon], {g} [baked|made] [a big cake|six sweet cookies|a warm apple pie|"
    "a plate of pancakes|a basket of fresh bread] for {h.him}.",
    "the smell was so good that {h} wanted to eat it all.",
    "{h} [took|carried] the food {p.to} and sat down {s}.",
    "soon {f}, {f.a_kind}, came [along|down the path|by].",
    '["That looks [good|yummy]," said {f}. "I have not eaten today."|"May I have a little bit?" asked {f}.|'
    "{f} was very hungry and looked at the food.]",
    '["No, it is all mine," said {h}.|{h} shook {h.his} head and held the food tight.|{h} did not want to share.]',
    "{f} [looked down and walked away|said nothing and went away|sat down alone {s2}].",
    "{h} took a bite, but [it did not taste good any more|{h.he} did not feel happy|{h.his} heart felt heavy].",
    '["I was not kind," {h.he} [thought|said to {h.himself}].|{h.he} thought about {f} for a long time.]',
    "{h} [ran after|went to find|called] {f}. "
    '"[I am sorry|Please come back]. [Let us eat together|We can share|Half of it is for you]," {h.he} said.',
    "they sat [in the sun|side by side|in the shade] and ate every [bite|crumb].",
    "[the food tasted better than ever.|they laughed and told funny stories.|{f} smiled, and {h} smiled too.]",
    "[{h} learned that sharing makes [food sweeter|everyone happy].|from then on, {h} always kept a piece for {f}.|"
    "the next day, {f} brought [a ripe pear|some nuts|a jar of jam] to share with {h}.]",
]

RAINY_DAY = [
    "one day, {h} wanted to go {p.to} with {f}, {f.a_kind}.",
    "but [dark clouds came|the sky turned gray], and it [began|started] to rain.",
    '["Now we cannot play," said {h}.|"I do not like the rain," {h} said.|{h} looked out of the window and '
    "[sighed|frowned].]",
    '[{f} thought for a moment.|{f} had an idea.] "[Let us build|We can make] [a tent|a castle|a ship|a train|a '
    "rocket] "
    '[with the chairs|out of pillows|out of boxes|with an old blanket]," {f.he} said.',
    "they found {o.a_kind}, {o2.a_kind} and [some string|a long rope|two sheets|a piece of paper].",
    "{h} held one end while {f} tied the other. [It fell down once, but they tried again.|It was not easy.|]",
    "soon it was [ready|done], and they [climbed|crawled] inside.",
    '"[We are going to the moon|We are on the wide sea|Look, I am the captain|We are kings of the land]!" {h} shouted.',
    "[they [saw|met] [a dragon|a whale|a giant|pirates] in their game and were very brave.|"
    "they told each other stories about [stars|dragons|the sea|far lands].]",
    '{g} brought them [warm milk|hot soup|cookies|apple slices] and said, "[What a fine place|How clever you are]!"',
    "when the rain stopped, there was a [big|bright] rainbow [over the house|in the sky].",
    "[but {h} and {f} did not even see it. They were having too much fun.|{h} and {f} ran out and jumped in the "
    "puddles.|"
    '"I like rain now," said {h}, and {f} laughed.]',
]

NIGHT_NOISE = [
    "[one night|late one evening], {h} was lying in bed when {h.he} heard [a strange noise. Scratch, scratch, "
    "scratch|a loud thump. Bump, bump, bump|a soft tapping sound. Tap, tap, tap].",
    '["What is that?" {h.he} whispered.|"Who is there?" {h.he} asked.|{h} sat up and listened.]',
    "[the room was dark, and|the wind was blowing, and] {h} was [afraid|scared].",
    "{h.he} [pulled the blanket over {h.his} head|hid under {h.his} pillow|held {h.his} {o.noun} very tight].",
    "the noise came again. {h} called for {g}.",
    "{g} came with a [small|bright] [lamp|candle|light] and sat on the bed.",
    '"[When we are afraid, it helps to look|Let us find out what it is|We can be brave together]," {g.he} said.',
    "{h} took {g.his} hand, and they [walked|went] slowly to the [door|window|kitchen|stairs].",
    "they looked around and saw [{x.a_kind} that was looking for a warm place|a branch that was moving in the wind|"
    "a little cup that was rolling on the floor].",
    '["It was only that!" said {h}, and {h.he} began to laugh.|{h} laughed. "I am not afraid any more," {h.he} said.]',
    "{g} [hugged {h.him}|kissed {h.him} good night|sang a soft song], and the moon [shone|smiled] through the window.",
    "[{h} closed {h.his} eyes and slept until morning.|that night, {h} dreamed of [stars|sheep|the sea|a {c} ship].|"
    "after that, {h} was not afraid of the dark.]",
]

NEW_SKILL = [
    "{h} wanted to learn [[how to swim|how to skate|how to ride a bike|how to dance] like {f}|"
    "how to climb the tall tree like {f}|how to play the flute like {f}].",
    "{f} was {f.a_kind} who [could do it very well|made it look easy|had learned it long ago].",
    "so one [day|morning], they went {p.to} to [try|practice].",
    "the first time, {h} [fell down|did it all wrong|was too slow]. The second time was [no better|even worse].",
    '["I will never learn it!" {h} [cried|said].|"This is too hard for me," said {h}.|{h} sat down {s} and wanted to '
    "stop.]",
    '{f} [smiled|shook {f.his} head] and said, "[I fell many times too|Nobody is good at first|You only need more '
    "time]."
    ' [Try again|Do not give up|Go slowly]."',
    "{h} [wiped {h.his} eyes|took a deep breath|stood up] and tried again.",
    "[every day after lunch|each morning|day after day], {h.he} practiced [a little|for an hour|with {f}]. "
    "[Even rain did not stop {h.him}.|Sometimes it hurt, but {h.he} did not stop.|{g} came to watch.]",
    "[then|at last], one [fine|sunny|lovely] day, {h} [did it|could do it] all alone!",
    '["Look at me!" {h.he} shouted.|"I did it! I did it!" {h.he} sang.] {f} [clapped|cheered|jumped up and down].',
    "[{g} was so proud that {g.he} made {h.his} favorite dinner.|they had a [little party|picnic] to celebrate.|"
    "{h} felt as tall as a tree.]",
    "[{h} knew now that practice makes hard things easy.|the next week, {h} helped {x.a_kind} learn something too.|"
    '"Thank you for waiting for me," {h} said to {f}.]',
]

BROKEN_THING = [
    "one day, {h} was playing with {h.his} {o} inside the house.",
    '{g} had said [many times|that morning], "Please do not [run|play] near the table."',
    "but {h} forgot. {h.He} [jumped|turned|ran] too fast and hit the table.",
    "[Crash|Oh no]! The [blue vase|pretty cup|glass bowl|old clock|flower pot|tea pot] fell down and broke.",
    '["What should I do?" {h.he} thought.|{h} was [scared|worried] and wanted to hide.]',
    "{h.he} [put the pieces under a rug|hid the pieces in a box|ran to {h.his} room and closed the door].",
    "but {h} could not [play|eat|sleep]. [{h.his} tummy hurt.|{h.he} felt bad.|{h.he} thought about it all day.]",
    '[{f}, {f.a_kind}, said, "It is better to tell the truth."|"You should tell what happened," said {h.his} friend '
    "{f}.]",
    "so {h} went to {g} with [tears in {h.his} eyes|a red face|slow steps].",
    '"I broke it. I am [so|very] sorry," {h.he} [said|whispered].',
    '{g} looked at {h} and said, "[Thank you for telling me|You were brave to tell the truth|'
    'I am glad that you are not hurt]. [We can fix it|Let us clean up together|A thing is only a thing]."',
    "they [glued the pieces together|swept the floor and made a new one out of clay|worked until it looked almost "
    "new].",
    "[{h} felt light and happy again.|{h} learned that the truth is always best.|after that, {h} only played outside "
    "with "
    "the {o.noun}.]",
]

SEED = [
    "one spring [day|morning], {g} gave {h} a [tiny|small|round] seed.",
    '"[What will it be|What is inside]?" asked {h}. "[Wait and see|It is a surprise|Be patient]," said {g}.',
    "{h} [dug|made] a little hole [in the garden|near the gate|beside the fence|behind the house], put the seed "
    "inside and gave it some water from a {c} [cup|can|bucket].",
    "the next day, {h.he} ran out to look, but [nothing was there|there was only dirt].",
    '["It does not work," {h.he} said sadly.|"Maybe it is sleeping," said {f}, {f.a_kind}.|{h} was not happy.]',
    "[each|every] day, {h} [watered it|sang to it|sat next to it]. [The sun was warm.|The rain fell.|Birds sang in "
    "the trees.]",
    "[one week passed. Then two weeks passed.|many days went by.|{h} waited and waited.]",
    "[one morning|at last|then, one day], there was a tiny green leaf!",
    "it grew [taller and taller|bigger and bigger|a little every day] until it was [a sunflower|a pumpkin|a tomato "
    "plant|"
    "a strawberry plant|a bean plant|a rose] for all to see.",
    "[{x.a_kind} came to sit on it.|{g} said that it was the prettiest plant in the world.|everyone came to look at "
    "it.]",
    '["You were [patient|kind to it], and so it grew," said {g}.|"Good things need time," said {g}.]',
    "[{h} saved one seed for the next year.|in the fall, {h} gave seeds to all {h.his} friends.|{h} smiled and gave "
    "it a little more "
    "water.|that evening, they had a party in the garden.]",
]

NEW_NEIGHBOR = [
    "one [day|morning], a new family moved into the house next door.",
    "they had {o.a_kind} and a little one named {f}. {f} was {f.a_kind}.",
    "{f} was very shy and sat alone {s}.",
    "{h} wanted to say hello, but {h.he} did not know [how|what to say].",
    '{h.he} asked {g}. "[Just smile and say your name|Give something from the heart|A friend is only one hello away]," '
    "said {g}.",
    "so {h} [picked some flowers|took {h.his} {o2}|drew a pretty picture|put two cookies in a bag] and went next door.",
    '["Hello, I am {h}. Do you want to play?" {h.he} [asked|said].|"This is for you," said {h}. "My name is {h}."]',
    "{f} looked up. [At first, {f.he} said nothing.|Slowly, {f.he} smiled.|{f.his} eyes were big.]",
    '["I was afraid that nobody would like me," said {f}.|"I miss my old home," said {f} in a small voice.]',
    '"[I like you|You can be my friend|We will have fun here]," said {h}. "Come, I will show you [the pond|the big '
    "tree|"
    'my secret place|the best hill]."',
    "[they ran {p.to} together.|they played until dinner.|they climbed, jumped and laughed.]",
    "[when the stars came out, {f} was not sad any more.|that night, both of them were too happy to sleep.|"
    "soon {f} knew everyone in the [village|town|street].]",
    "[from that day on, {h} and {f} were best friends.|and that is how {h} and {f} became friends.]",
]

LOST_WAY = [
    "one [warm|sunny|bright] [afternoon|day], {h} followed {x.a_kind} into the woods.",
    "[{x} went left and right, and {h} ran after it.|{h.he} did not look where {h.he} was going.|it was so pretty "
    "that {h} "
    "forgot everything else.]",
    "[after a while|when {x} was gone], {h.he} stopped and looked around. All the trees looked the same.",
    '["Where am I?" {h.he} asked.|"I want to go home," {h.he} said, and {h.his} voice was small.|{h} was lost!]',
    "the sun [was going down|went behind the hills], and the woods grew [dark|cold].",
    "{h} sat down {s} and [cried|began to cry|called for help].",
    "[an old|a wise old|a big gray] {w.noun} heard {h.him} and came [closer|near].",
    '"[Why are you here all alone|What are you doing in my woods|Are you lost], {h.kind}?" asked {w}.',
    '"I cannot find my home," said {h}. "It has a {c} [door|roof|gate]."',
    '"I know that house," said {w}. "[Follow me|Walk behind me|Stay close to me]."',
    "they went [over a bridge|past the {c} flowers|along the stream], [up a hill|through the tall grass|around a big "
    "rock] "
    "and [down a path|out of the woods].",
    "and there was {h.his} home! {g} was standing at the door [with a lamp|and waiting].",
    "{g} [held {h.him} tight|hugged {h.him} for a long time]. [{h} said thank you to {w}.|"
    '"Thank you, kind {w.noun}!" {h} called.]',
    "[after that, {h} never went into the woods alone.|{h} promised to stay near the house.|the next day, {h} brought "
    "{w} "
    "[a basket of apples|some warm bread|a {c} scarf].]",
]

BIRTHDAY = [
    "{f}, {f.a_kind}, had a birthday, and {h} wanted to give {f.him} something special.",
    "{h.he} [had no money|did not have much], so {h.he} [made|painted|fixed] {o.a_kind} all by {h.himself}.",
    "it took [three days|all week|a long time], but it was [beautiful|very pretty|just right].",
    "on the way to the party, [the wind blew it into the pond|{h} fell, and it broke|it began to rain, and the paint "
    "came off].",
    '["Now I have no present," {h} [cried|said].|{h} felt like crying.|"It is ruined!" said {h}.]',
    "{x.a_kind} saw {h.him} and [stopped|came near]. "
    '"[You can still give something|A gift does not have to be a thing|{f} will like anything from you]," it said.',
    "{h} thought [and thought|about it]. Then {h.he} [had an idea|began to smile].",
    "at the party, there were [balloons|candles|lots of cakes], and everyone gave {f} a present.",
    'when it was {h.his} turn, {h} said, "[My present broke|I have no box], but I made [a song|a dance|a poem|a '
    'story] for you."',
    "{h.he} was [nervous|shy], but {h.he} did it from beginning to end.",
    "[the room was very quiet.|everyone listened.|nobody moved.] Then [they all clapped|{f} jumped up and hugged "
    "{h.him}].",
    '"[This is the best present of all|I will never forget it|That was just for me, and I love it]," said {f}.',
    "[{h} was so happy that {h.he} ate three pieces of cake.|they danced until the moon came up.|and {h} did it again "
    "and "
    "again, until everyone knew it.]",
]

RACE = [
    "[every summer|each year], there was a [big|great] race {p.at}, and the winner got [a golden cup|a {c} ribbon|a "
    "giant cake].",
    "{h} wanted to win. [{h.he} ran every morning.|{h.he} practiced with {g}.|{h.he} dreamed about it at night.]",
    "{f}, {f.a_kind}, wanted to win too. [{f.he} was very fast.|{f.he} had long legs.|They were good friends.]",
    '"[Ready, set, go|One, two, three, go]!" [shouted {g}|called the {w.noun}], and they all ran.',
    "{f} was first, and {h} was right behind {f.him}. [Dust flew up.|The crowd cheered.|{h.his} heart went boom, "
    "boom, boom.]",
    'then {f} [tripped over a root|slipped in the mud|stepped on a sharp stone] and fell. "Ouch! My [leg|foot]!" '
    "{f.he} cried.",
    "{h} could [run past|win now]. [The end was so close.|{h.he} looked at the finish line.|Everyone shouted.]",
    'but {h} stopped and [turned around|went back]. "[Are you hurt|Can you stand up]?" {h.he} asked.',
    "{h.he} [helped {f} up|put {f.his} arm around {h.his} neck|cleaned the cut with some water], and they walked "
    "[slowly|together] "
    "to the end.",
    "[they were the very last.|all the others were there before them.] But everyone [clapped|cheered] for them "
    "[loudest|most].",
    '["You did not win, but you have a big heart," said {g}.|"A friend is better than a prize," said {h}.]',
    "[that night, all of them ate cake and sang songs.|{f} said that {h} was the real winner.|"
    "the next year, they crossed the line hand in hand.]",
]

FOUND_THING = [
    "[one day|one morning|on a cold day], {h} was going {p.to} when {h.he} saw something [shiny|bright] {s}.",
    "it was [a silver ring|a gold coin|a tiny key|a little purse|a watch on a chain].",
    '["How lucky I am!" {h.he} said.|"Now it is mine," said {h}.|{h} had never seen anything so pretty.]',
    "{h.he} put it in {h.his} pocket and [walked on|began to hum a song|smiled all the way].",
    "but then {h.he} [saw|met] {w.a_kind} who was [looking at the ground|searching everywhere|crying].",
    '"[I lost something that I love|I have lost my treasure|I lost a gift from my mother]," said {w}. '
    '"[Now it is gone|I have looked all day|I miss it so much]."',
    "{h} [touched|felt] {h.his} pocket. [{h.he} wanted to keep it.|It was so pretty.|What should {h.he} do?]",
    '[{f}, {f.a_kind}, was with {h.him} and said, "You know what is right."|{h.he} remembered what {g} always said: '
    '"Be honest."]',
    'so {h} [held out {h.his} hand|opened {h.his} hand]. "[Is this yours|Did you lose this]?" {h.he} asked.',
    '[{w} was so happy that {w.he} jumped.|"Yes! Oh, thank you!" said {w}.]',
    "[to say thank you, {w} gave {h} [a bag of plums|a jar of honey|a ride home|a kiss on the cheek].|"
    "{w} told {h} a wonderful story about it.]",
    "{h} went home with [empty pockets|nothing in {h.his} pocket], but [with a full heart|{h.he} felt rich].",
]

WINTER = [
    "it was winter, and snow [lay|fell] on [the roofs|the fields|everything].",
    "{h} [looked out of the window|was making a snowman|was on the way home] and saw {x.a_kind} in the snow.",
    "it was [cold|shaking|too weak to move]. [It had no home.|Its home was gone.|It could not find any food.]",
    '["You poor thing," said {h}.|"I will help you," {h.he} said softly.|{h} felt sorry for it.]',
    "{h.he} [picked it up with both hands|put it in {h.his} hat|wrapped it in {h.his} scarf] and [carried|took] it "
    "home.",
    '"[Can it stay with us|May I keep it], please?" {h.he} asked {g}. "[Until spring|Until it is strong]," said {g}.',
    "they made a little bed out of [a shoe box|a basket|a {c} sock] and put it near the [fire|stove].",
    "{h} gave it [warm water|sweet milk|crumbs|a drop of honey] [every morning|three times a day], and {f}, "
    "{f.a_kind}, "
    "brought [seeds|soft leaves|some wool] for the bed.",
    "[day by day|slowly], {x} grew [strong|well] again.",
    "[then spring came.|one day, the snow melted.] {x} [looked at|sat by] the open window.",
    '["It wants to go," said {g}.|{h} was sad, but {h.he} knew that it was time.] "[Goodbye, little friend|Good '
    'luck]," said {h}.',
    "{x} [turned around once|went in a circle around {h.his} head] and was gone.",
    "[but each spring, it came back to say hello.|{h} missed it, but was happy that it was free.|the next morning, "
    "there was "
    "a {c} [flower|leaf] on the window, just for {h}.]",
]

PLOTS = [
    LOST_THING,
    STUCK_ANIMAL,
    SHARING,
    RAINY_DAY,
    NIGHT_NOISE,
    NEW_SKILL,
    BROKEN_THING,
    SEED,
    NEW_NEIGHBOR,
    LOST_WAY,
    BIRTHDAY,
    RACE,
    FOUND_THING,
    WINTER,
]
