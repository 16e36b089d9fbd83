"""Names and things that the built-in stories rarely mention beside their plots, and the sentences that mention them.

They give the stories enough words for a vocabulary of several thousand tokens. In a sentence `{n}` is a name, and
`{t}`, `{t2}` and `{t3}` are things; the other fields are those of `plots.py`.
"""

NAMES = (
    "Ada Agnes Alba Alma Amber Amelia Amy Andrea Angela Anita Annika April Arlo Arthur Astrid Aurora Axel Barbara "
    "Basil Beatrice Benny Bertha Bianca Boris Bridget Bruno Camilla Carl Carla Carmen Caroline Casper Cecilia Celia "
    "Charles Charlotte Chloe Clemens Colin Conrad Cora Cosmo Cyrus Dagmar Daniel Daphne Dario Delia Dennis Dexter "
    "Diana Dominic Dora Doris Dorothy Douglas Edgar Edith Edmund Edward Eileen Elena Eli Elias Elliot Elsa Elton Emil "
    "Emily Eric Ernest Esther Ethan Eva Evan Fabian Felix Fergus Fiona Flora Florence Frances Frank Frederick Frieda "
    "Gabriel Gavin Gemma George Georgia Gerald Gilbert Gina Gordon Gregory Greta Gus Gustav Hans Harold Harriet "
    "Harvey Heidi Helen Herbert Herman Hilda Holly Homer Horace Howard Hubert Ian Ida Igor Ingrid Irene Iris Isaac "
    "Isabel Ivan Jana Jasmine Jasper Jean Jerome Jesse Joan Johanna Jonah Jonas Jordan Joseph Joshua Josie Joyce "
    "Judith Judy Karl Kate Katrina Keith Kevin Kirsten Lars Laura Laurence Leah Lena Leonard Lewis Lilian Linda Linus "
    "Lisa Logan Lola Lorenzo Lorna Louis Louise Lydia Mabel Magnus Marcel Marcus Margaret Marian Mario Marlene Martha "
    "Mathilda Matthew Maurice Melissa Melvin Michael Milan Mildred Miles Milo Mina Miranda Miriam Monica Morris Myra "
    "Nadia Naomi Natalie Nathan Nelson Nicholas Nicole Nigel Norman Octavia Odette Olga Oswald Otto Owen Pamela "
    "Patrick Paula Pauline Pearl Penelope Percy Petra Philip Phoebe Polly Quentin Rachel Ralph Ramona Raphael Raymond "
    "Rebecca Regina Reuben Rex Richard Rita Robert Robin Rodney Roger Roland Roman Rosalind Rowan Rudolf Rufus Rupert "
    "Sabrina Sally Samantha Sandra Sarah Sebastian Selma Sheila Sidney Silas Silvia Solomon Sonia Stanley Stella "
    "Stephen Susan Sven Tabitha Tamara Tanya Teresa Thelma Thomas Tilda Timothy Tobias Trevor Trudy Ulrich Ursula "
    "Valentin Vanessa Vera Vernon Victor Victoria Vincent Viola Virginia Vivian Walter Wanda Warren Wendy Wesley "
    "Wilbur Wilhelm William Winston Yvonne Zachary Zelda"
)
# No word starts with a vowel that is spoken as a consonant, because the article depends on the letter.
THINGS = (
    "accordion acorn actor airport album alligator almond alphabet ambulance anchor angel ant antelope anthill anvil "
    "apartment apricot apron aquarium arch armchair arrow artichoke artist astronaut attic avocado baboon backpack "
    "badge bagel baker bakery balcony ballerina bamboo banana bandage banjo barn barrel bat bathtub battery beach "
    "bead bean beard bed beehive beet beetle bellflower belt bench beret bicycle bison blackberry blackbird "
    "blacksmith blade blossom blouse blueberry boar bobsled bolt bonfire boomerang boot bottle boulder bouquet bow "
    "bowl boxer branch brick bride brook broom brush bubble buckle buffalo bugle bulb bull bulldozer bumblebee bun "
    "bus butcher butler buzzard cabbage cabin cactus cage cake calendar calf camel camera camp campfire canal canary "
    "candle canoe canyon captain car caravan card carnation carp carpenter carpet carriage carrot cart cashew "
    "castanet castle caterpillar cathedral cauliflower cave cello chain chair chalkboard chameleon champion chapel "
    "cheetah chef cherry chess chestnut chimney chimpanzee chipmunk chisel church cicada circus clarinet claw cliff "
    "clipboard clock closet cloud clown coach coast cobra cobweb cockatoo coconut coin comb comet compass computer "
    "cone cook cookie cork corn corner costume couch cowboy crab crane crater crib cricket crocodile crocus crossroad "
    "crown crystal cuckoo cucumber cup cupboard curtain cushion cymbal daffodil dahlia daisy dancer dandelion dart "
    "date dentist desert desk detective diamond dictionary dinosaur diver doctor dolphin dome domino donkey doorbell "
    "doormat dormouse doughnut dove dragon dragonfly drawbridge dresser dromedary dumpling dwarf eagle earring easel "
    "echo eclipse eel egg eggplant elevator elf elk emerald emperor engine envelope escalator explorer eyelash falcon "
    "farmer faucet fawn fence fern ferret ferry fiddle field fig firefighter firefly fireplace fish flagpole flame "
    "flamingo flashlight flask flea fleece flounder foal fog footprint footstool fork fort fossil fountain freckle "
    "freezer fridge frisbee funnel gadget galaxy garage garland gazelle gecko gem geranium geyser ghost giant gibbon "
    "giraffe glacier gladiator globe glove gnome goblet goblin goldfish gondola gong gooseberry gorilla grape "
    "grapefruit grasshopper greenhouse griffin grill groundhog guard guitar gull gymnast hailstone hairbrush hall "
    "hamburger hammer hammock hamster handbag handkerchief hanger harbor hare harmonica harp harpoon hawk hazelnut "
    "headphone heart heater hedge helicopter helmet hen herring hinge hippopotamus hive holly hook hoop hornet "
    "horseshoe hose hotel hound hummingbird hut hyacinth hyena iceberg icicle igloo iguana inkwell insect iris iron "
    "island ivy jackal jacket jaguar jay jeep jellyfish jester jewel jigsaw jockey jug juggler jungle juniper "
    "kangaroo kayak kennel kettle keyboard keyhole kimono king kingfisher kiosk kiwi knapsack knife knight knot koala "
    "lab lagoon lake lamp lamppost leek lemon lemur leopard letter lettuce librarian library lighthouse lilac lily "
    "limousine lion lizard llama lobster lock locket locomotive locust lollipop loom lotus loudspeaker lute lynx "
    "machine mackerel magazine magician magnet magpie mailbox mammoth manatee mandolin mango mansion map marigold "
    "marionette market marmot marsh marten mask mast mat match mattress mayor maze meadowlark medal melon menu "
    "mermaid meteor microphone microscope midwife mill miner minnow mint mirror mole monk monster monument moose mop "
    "mosaic mosquito motel motorcycle mountain mouth muffin mug mule museum mushroom musician mussel mustache napkin "
    "narcissus narwhal necktie needle nest net nettle newspaper newt nightgown nightingale noodle nose notebook "
    "nugget nurse nut nutcracker oak oar oasis oat oboe ocean octopus olive omelet onion opal opera orangutan "
    "orchestra orchid organ ornament osprey ostrich outfit oven overcoat ox oyster paddle padlock pail paintbrush "
    "painter pajama palace palm pan pancake pansy panther papaya parachute parade parakeet parcel parrot parsnip "
    "passport pastry patch path pavilion pawn pea peach peacock peanut pearl peg pelican pen pendulum peony "
    "peppermint periscope petal petunia pharmacy pheasant photograph piano pickle pie pier pig pigeon pike pilot pin "
    "pineapple pinecone pinwheel pipe pirate pistachio pitcher pizza plane planet plate platypus plow plum plumber "
    "poet polecat pond poodle poppy porcupine porpoise port postcard postman pot potato potter prairie prawn pretzel "
    "primrose prince princess printer prism propeller prune puffin pulley pump pumpkin purse puzzle pyramid python "
    "quail quarry quartz queen quill quilt quince radiator radio radish raft railway rainbow raincoat raisin rake ram "
    "ranch raspberry rat raven razor referee refrigerator reindeer restaurant rhinoceros rider river roast robot "
    "rocket roller rook rooster root rope rose rosebush rosemary rowboat ruby rudder rug ruler runway sack saddle "
    "safe sailboat sailor salad salamander salmon saltshaker sandal sandcastle sandwich sapphire sardine satellite "
    "sauce saucepan saucer sausage saw saxophone scale scallop scarecrow school scientist scooter scorpion screw "
    "screwdriver sculptor seagull seahorse seal seesaw shadow shamrock shark shed sheep sheepdog shell shepherd "
    "shield shirt shoe shoelace shop shore shovel shower shrimp shrub sieve signpost singer sink skateboard skeleton "
    "ski skirt skunk skyscraper sled sleigh slide sling slipper sloth slug snail snake sneaker snowball snowdrop "
    "snowflake snowman sock sofa soldier soup spade spaniel spark spatula spider sponge spool spoon spring sprinkler "
    "squash squid stable stadium stage staircase stamp star starfish starling statue steamboat steeple stethoscope "
    "stocking stool stork storm stove stranger strawberry street submarine subway suitcase sun sundae sundial "
    "sunflower surfboard swallow swamp swan sweater syrup table tadpole tailor tambourine tangerine tank tapestry "
    "tapir tarantula taxi tea teacher teapot teaspoon telegram telephone telescope television tent termite terrace "
    "theater thermometer thermos thimble thistle thorn throne thrush ticket tie tiger tile toad toaster toffee tomato "
    "tooth toothbrush torch tornado toucan towel tower toy tractor train trampoline trapdoor trapeze treasure "
    "treehouse triangle tricycle trident trombone trout truck truffle trunk tuba tugboat tulip tunnel turkey turnip "
    "twig typewriter umbrella vacuum valley van vase vegetable vest veterinarian village vine violet violin volcano "
    "volleyball vulture waffle waiter wallet walnut walrus wand wardrobe warthog wasp watch watchdog waterfall "
    "watermelon wave weasel weathercock weaver web wedding whale wheel wheelbarrow wheelchair wig wildcat windmill "
    "window windshield wing witch wizard wolf wolverine wombat woodpecker worm wreath wren wrench xylophone yacht yak "
    "yam yogurt yolk zebra zeppelin zipper zither zoo zucchini"
)
DETAILS = [
    "{h.he} liked to draw, and [today|one day|last week] {h.he} drew {t} and {t2}.",
    "{h.he} once dreamed of {t} that danced with {t2}.",
    "in {h.his} [big|old|favorite] book, there were pictures of {t}, {t2} and {t3}.",
    "[once a year|every summer|in the winter], {n} sent {h.him} a card with a picture of {t}.",
    "a friend named {n} had made {h.him} {t} and {t2} out of [paper|wood|clay].",
    "{h.his} [neighbor|cousin] {n} often told {h.him} a story about {t} and {t2}.",
    "in the window of the toy shop, {h.he} had seen {t} next to {t2}.",
    "{h.he} knew a funny song about {t}, {t2} and {t3}.",
]
