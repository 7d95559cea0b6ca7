"""The words that exercises are filled with: small lists, so that a small model meets every word many times."""

NAMES = (
    "Hans Gretel Anna Peter Clara Otto Rosa Karl Emma Paul Marie Jacob Lena Max Ida Fritz Ella Georg Nora Ludwig "
    "Martha Felix Sophie Konrad Vera Oscar Helen Anton Greta Simon"
).split()
CITIES = (
    "Ulm Bremen Berlin Paris London Rome Vienna Prague Moscow Lisbon Madrid Oslo Dublin Athens Cairo Hamburg Cologne "
    "Geneva Warsaw Milan"
).split()
TRADES = (
    "miller tailor baker smith cook gardener soldier fisherman hunter weaver shoemaker teacher doctor singer painter"
).split()
COLOURS = "red blue green white black golden silver yellow brown grey".split()
BEASTS = "fox wolf bear cat dog goose horse frog raven hare mouse cow goat lion bird donkey".split()
THINGS = (
    "key ring lamp book apple rose cup sword hat coat loaf feather letter coin drum basket mirror candle spoon shoe"
).split()
PLACES = (
    "garden forest kitchen castle mill village church market meadow tower stable cellar bridge river well"
).split()
ADJECTIVES = "old young clever poor brave kind little proud merry lazy wise hungry".split()
SKIES = "sunny rainy cloudy snowy windy foggy".split()
PEOPLE = "king queen prince princess miller tailor baker hunter soldier gardener fisherman cook shepherd witch".split()
