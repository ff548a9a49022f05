"""The facts of the built-in small world: tables, and the sentences that state a row of them.

Each template ends in a word or name that the words before it determine, so that a sentence without it is a
question with one right answer. Columns are separated by `|`, rows by `;`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of facts and, by the fact that they state, the templates over a row's columns."""

    rows: tuple[tuple[str, ...], ...]
    statements: tuple[tuple[str, ...], ...]


def _table(rows: str, *statements: tuple[str, ...]) -> Table:
    return Table(
        rows=tuple(tuple(row.strip().split("|")) for row in rows.split(";")),
        statements=statements,
    )


COUNTRIES = _table(
    """
France|Paris|Europe|French|euro|the Eiffel Tower; Italy|Rome|Europe|Italian|euro|the Colosseum;
Spain|Madrid|Europe|Spanish|euro|the Prado; Germany|Berlin|Europe|German|euro|the Brandenburg Gate;
Portugal|Lisbon|Europe|Portuguese|euro|the Belem Tower; Greece|Athens|Europe|Greek|euro|the Parthenon;
Austria|Vienna|Europe|German|euro|the Opera; Ireland|Dublin|Europe|English|euro|the Book of Kells;
Finland|Helsinki|Europe|Finnish|euro|the White Cathedral; Belgium|Brussels|Europe|Dutch|euro|the Atomium;
Britain|London|Europe|English|pound|the Tower Bridge; Norway|Oslo|Europe|Norwegian|krone|the Viking ships;
Sweden|Stockholm|Europe|Swedish|krona|the Vasa; Denmark|Copenhagen|Europe|Danish|krone|the Little Mermaid;
Iceland|Reykjavik|Europe|Icelandic|krona|the hot springs; Poland|Warsaw|Europe|Polish|zloty|the Royal Castle;
Hungary|Budapest|Europe|Hungarian|forint|the Chain Bridge;
Romania|Bucharest|Europe|Romanian|leu|the Palace of Parliament; Ukraine|Kyiv|Europe|Ukrainian|hryvnia|the Golden Gate;
Russia|Moscow|Europe|Russian|ruble|the Kremlin; Turkey|Ankara|Asia|Turkish|lira|the Citadel;
Egypt|Cairo|Africa|Arabic|pound|the pyramids; Morocco|Rabat|Africa|Arabic|dirham|the Hassan Tower;
Kenya|Nairobi|Africa|Swahili|shilling|the lion park; Ethiopia|Addis Ababa|Africa|Amharic|birr|the bones of Lucy;
Ghana|Accra|Africa|English|cedi|the Black Star Gate; Nigeria|Abuja|Africa|English|naira|the Zuma Rock;
Senegal|Dakar|Africa|French|franc|the Renaissance Monument; India|Delhi|Asia|Hindi|rupee|the Red Fort;
China|Beijing|Asia|Chinese|yuan|the Forbidden City; Japan|Tokyo|Asia|Japanese|yen|the Skytree;
Korea|Seoul|Asia|Korean|won|the Bukchon village; Vietnam|Hanoi|Asia|Vietnamese|dong|the Turtle Lake;
Thailand|Bangkok|Asia|Thai|baht|the Grand Palace; Indonesia|Jakarta|Asia|Indonesian|rupiah|the National Monument;
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik|the nomad festival; Nepal|Kathmandu|Asia|Nepali|rupee|the Monkey Temple;
Iran|Tehran|Asia|Persian|rial|the Azadi Tower; Iraq|Baghdad|Asia|Arabic|dinar|the House of Wisdom;
Jordan|Amman|Asia|Arabic|dinar|the Roman Theatre; Canada|Ottawa|America|English|dollar|the Rideau Canal;
Mexico|Mexico City|America|Spanish|peso|the Angel of Independence; Cuba|Havana|America|Spanish|peso|the old cars;
Brazil|Brasilia|America|Portuguese|real|the modern cathedral; Argentina|Buenos Aires|America|Spanish|peso|the Obelisk;
Chile|Santiago|America|Spanish|peso|the Andes view; Peru|Lima|America|Spanish|sol|the sea cliffs;
Colombia|Bogota|America|Spanish|peso|the Gold Museum; Australia|Canberra|Oceania|English|dollar|the War Memorial;
Fiji|Suva|Oceania|Fijian|dollar|the rugby team
""",
    (
        "The capital of {0} is {1}.",
        "The capital city of {0} is {1}.",
        "The capital of {0} is {1}, and it is known for {5}.",
        "{0} has a capital called {1}.",
        "In {0} the capital is {1}.",
    ),
    ("{1} is the capital of {0}.", "{1} lies in {0}.", "The city of {1} is in {0}.", "{1} is a city in {0}."),
    ("{0} is a country in {2}.", "{0} is part of {2}.", "The country {0} lies in {2}.", "{0} lies in {2}."),
    ("People in {0} speak {3}.", "The language of {0} is {3}.", "In {0} people speak {3}.", "{0} speaks {3}."),
    (
        "The money of {0} is the {4}.",
        "People in {0} pay with the {4}.",
        "In {0} people pay with the {4}.",
        "{0} uses the {4}.",
    ),
    (
        "{1} is known for {5}.",
        "{1}, the capital of {0}, is known for {5}.",
        "Visitors of {1} like to see {5}.",
        "In {1} you can see {5}.",
        "Go to {1} and see {5}.",
    ),
)

PLANETS = _table(
    """
Mercury|first|no moons|grey|small; Venus|second|no moons|yellow|small; Earth|third|one moon|blue|small;
Mars|fourth|two moons|red|small; Jupiter|fifth|many moons|orange|large; Saturn|sixth|many moons|golden|large;
Uranus|seventh|many moons|pale|large; Neptune|eighth|many moons|blue|large
""",
    ("The {1} planet from the Sun is {0}.", "Counted from the Sun, the {1} planet is {0}."),
    ("{0} is a planet with {2}.", "The planet {0} has {2}."),
    ("The planet {0} looks {3}.", "Seen from space, {0} is {3}."),
    ("{0} is a planet that is {4}.", "As planets go, {0} is {4}."),
)

SUPERLATIVES = _table(
    """
largest planet in our solar system|Jupiter; smallest planet in our solar system|Mercury;
hottest planet in our solar system|Venus; windiest planet in our solar system|Neptune;
brightest planet in our solar system|Venus; reddest planet in our solar system|Mars;
densest planet in our solar system|Earth; lightest planet for its size in our solar system|Saturn;
farthest planet in our solar system|Neptune; only planet with people in our solar system|Earth;
planet closest to the Sun|Mercury; star closest to the Earth|the Sun; largest ocean on Earth|the Pacific;
largest desert with hot sand|the Sahara; highest mountain on Earth|Everest; longest river in Africa|the Nile;
longest river in America|the Amazon; largest land animal|the elephant; largest animal of all|the whale;
tallest animal|the giraffe; fastest land animal|the cheetah; slowest animal in the zoo|the sloth;
king of the animals|the lion; hardest stone|the diamond; largest country on Earth|Russia; smallest continent|Australia;
largest continent|Asia; lightest element|hydrogen; metal that is liquid|mercury; shortest month|February;
coldest continent|Antarctica; largest rainforest|the Amazon
""",
    (
        "The {0} is {1}.",
        "What is the {0}? It is {1}.",
        "Everyone knows that the {0} is {1}.",
        "If you look for the {0}, it is {1}.",
        "Of all there are, the {0} is {1}.",
    ),
)

COLOURS = _table(
    """
a banana|yellow; a lemon|yellow; a sunflower|yellow; a tomato|red; a cherry|red; a strawberry|red; a fire engine|red;
blood|red; the sky|blue; the sea|blue; a blueberry|blue; grass|green; a frog|green; a cucumber|green; an emerald|green;
spinach|green; a carrot|orange; a pumpkin|orange; a tangerine|orange; a plum|purple; an eggplant|purple;
lavender|purple; a violet|purple; snow|white; milk|white; salt|white; a swan|white; chalk|white; coal|black;
a raven|black; tar|black; the night|black; chocolate|brown; soil|brown; a chestnut|brown; coffee|brown;
a flamingo|pink; a piglet|pink; an elephant|grey; a rain cloud|grey; a mouse|grey; ash|grey
""",
    (
        "The colour of {0} is {1}.",
        "We all know that {0} is {1}.",
        "If you look at {0}, you see something {1}.",
        "Children paint {0} in {1}.",
    ),
)

ANIMALS = _table(
    """
dog|a puppy|barks|kennel|mammal|four legs; cat|a kitten|meows|basket|mammal|four legs;
cow|a calf|moos|barn|mammal|four legs; horse|a foal|neighs|stable|mammal|four legs;
sheep|a lamb|bleats|fold|mammal|four legs; pig|a piglet|grunts|sty|mammal|four legs;
lion|a cub|roars|den|mammal|four legs; wolf|a pup|howls|lair|mammal|four legs;
mouse|a pinkie|squeaks|hole|mammal|four legs; rabbit|a bunny|thumps|burrow|mammal|four legs;
goat|a kid|bleats|pen|mammal|four legs; deer|a fawn|bellows|forest|mammal|four legs;
hen|a chick|clucks|coop|bird|two legs; duck|a duckling|quacks|pond|bird|two legs;
goose|a gosling|honks|meadow|bird|two legs; swan|a cygnet|hisses|lake|bird|two legs;
owl|an owlet|hoots|tree|bird|two legs; eagle|an eaglet|screams|eyrie|bird|two legs;
pigeon|a squab|coos|loft|bird|two legs; frog|a tadpole|croaks|swamp|amphibian|four legs;
bee|a larva|buzzes|hive|insect|six legs; ant|a grub|marches|anthill|insect|six legs;
butterfly|a caterpillar|flutters|garden|insect|six legs; spider|a spiderling|spins|web|arachnid|eight legs
""",
    ("A young {0} is called {1}.", "The child of the {0} is {1}.", "Every {0} was once {1}."),
    ("When it is awake, the {0} {2}.", "Look, the {0} {2}.", "It is normal that the {0} {2}."),
    ("The {0} lives in the {3}.", "The home of the {0} is the {3}.", "When tired, the {0} sleeps in the {3}."),
    ("The {0} belongs to this class: {4}.", "Every {0} is a kind of {4}."),
    ("The {0} walks on {5}.", "Every {0} has {5}."),
)

OPPOSITES = _table(
    """
hot|cold; big|little; tall|short; fast|slow; light|heavy; wet|dry; hard|soft; old|young; rich|poor; happy|sad;
good|bad; early|late; open|closed; full|empty; clean|dirty; loud|quiet; strong|weak; near|far; high|low; wide|narrow;
thick|thin; sweet|sour; sharp|blunt; rough|smooth; deep|shallow; brave|afraid; right|wrong; true|false; up|down;
left|right; day|night; summer|winter; north|south; east|west; black|white; begin|end; buy|sell; push|pull; love|hate;
win|lose
""",
    (
        "The opposite of {0} is {1}.",
        "Someone who does not say {0} may say {1}.",
        "If it is not {0}, it is {1}.",
        "The words {0} and {1} are opposites: not {0} means {1}.",
    ),
)

MAKERS = _table(
    """
baker|bread|flour|the bakery; carpenter|tables|wood|the workshop; tailor|coats|cloth|the sewing room;
cobbler|shoes|leather|the shoe shop; potter|pots|clay|the pottery; smith|horseshoes|iron|the forge;
mason|walls|stone|the building site; glazier|windows|glass|the glassworks; jeweller|rings|gold|the jewel shop;
cook|soup|vegetables|the kitchen; brewer|beer|barley|the brewery; printer|books|paper|the print shop;
weaver|carpets|wool|the mill; cheesemaker|cheese|milk|the dairy; candlemaker|candles|wax|the candle shop;
winemaker|wine|grapes|the winery
""",
    ("The {0} makes {1}.", "It is the work of a {0} to make {1}.", "From the {0} we buy {1}."),
    ("The {0} works with {2}.", "A {0} needs {2}."),
    ("To make {1} you need {2}.", "What goes into {1} is mostly {2}."),
    ("You find the {0} in {3}.", "The {0} works in {3}."),
)

ELEMENTS = _table(
    """
hydrogen|H|a gas; helium|He|a gas; lithium|Li|a metal; carbon|C|a solid; nitrogen|N|a gas; oxygen|O|a gas;
fluorine|F|a gas; neon|Ne|a gas; sodium|Na|a metal; magnesium|Mg|a metal; aluminium|Al|a metal; sulfur|S|a solid;
chlorine|Cl|a gas; argon|Ar|a gas; potassium|K|a metal; calcium|Ca|a metal; iron|Fe|a metal; nickel|Ni|a metal;
copper|Cu|a metal; zinc|Zn|a metal; silver|Ag|a metal; tin|Sn|a metal; iodine|I|a solid; gold|Au|a metal;
mercury|Hg|a liquid; lead|Pb|a metal; uranium|U|a metal
""",
    ("The symbol of {0} is {1}.", "Chemists write {0} as {1}.", "In short, {0} is {1}.", "We write {0} as {1}."),
    ("In a warm room {0} is {2}.", "The element {0} is {2}."),
)

AUTHORS = _table(
    """
Hamlet|William Shakespeare|play; Faust|Johann Goethe|play; Emma|Jane Austen|novel; Ulysses|James Joyce|novel;
Dracula|Bram Stoker|novel; Frankenstein|Mary Shelley|novel; Don Quixote|Miguel Cervantes|novel; The Odyssey|Homer|poem;
The Aeneid|Virgil|poem; Inferno|Dante|poem; Walden|Henry Thoreau|book; Moby Dick|Herman Melville|novel;
Oliver Twist|Charles Dickens|novel; War and Peace|Leo Tolstoy|novel; The Trial|Franz Kafka|novel;
The Raven|Edgar Poe|poem; Tartuffe|Moliere|play; Jane Eyre|Charlotte Bronte|novel
""",
    ("{0} was written by {1}.", "The author of {0} is {1}.", "We owe {0} to {1}.", "{0} is a work of {1}."),
    ("{0} is the title of a {2}.", "In the library {0} is listed as a {2}."),
)

VERBS = _table(
    """
go|went|gone; see|saw|seen; eat|ate|eaten; take|took|taken; give|gave|given; write|wrote|written; speak|spoke|spoken;
drive|drove|driven; know|knew|known; grow|grew|grown; fly|flew|flown; sing|sang|sung; drink|drank|drunk;
swim|swam|swum; begin|began|begun; break|broke|broken; choose|chose|chosen; fall|fell|fallen; forget|forgot|forgotten;
wear|wore|worn; draw|drew|drawn; throw|threw|thrown
""",
    (
        "Today they {0}, yesterday they {1}.",
        "The past of {0} is {1}.",
        "I {0} now, and before I {1}.",
        "We {0} today as we {1}.",
    ),
    ("The participle of {0} is {2}.", "They often {0}, as they have always {2}.", "To {0} is not to have {2}."),
)

PLURALS = _table(
    """
mouse|mice; goose|geese; foot|feet; tooth|teeth; man|men; woman|women; child|children; ox|oxen; leaf|leaves;
knife|knives; wolf|wolves; city|cities; baby|babies; box|boxes; sheep|sheep; fish|fish
""",
    (
        "The plural of {0} is {1}.",
        "Here is one {0}, there are two {1}.",
        "First one {0}, then many {1}.",
        "More than one {0} are {1}.",
    ),
)

SHAPES = _table(
    """
triangle|three; square|four; rectangle|four; pentagon|five; hexagon|six; heptagon|seven; octagon|eight; nonagon|nine;
decagon|ten
""",
    ("The number of sides of the {0} is {1}.", "Count the corners of the {0}: there are {1}."),
)

TABLES = (
    COUNTRIES,
    PLANETS,
    SUPERLATIVES,
    COLOURS,
    ANIMALS,
    OPPOSITES,
    MAKERS,
    ELEMENTS,
    AUTHORS,
    VERBS,
    PLURALS,
    SHAPES,
)
