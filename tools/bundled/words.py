"""The words that exercises are filled with: small lists, so that a small model meets every word many times."""


def _listed(words: str) -> list[str]:
    return words.split()


NAMES = _listed(
    "Hans Gretel Anna Peter Clara Otto Rosa Karl Emma Paul Marie Jacob Lena Max Ida Fritz Ella Georg Nora Ludwig "
    "Martha Felix Sophie Konrad Vera Oscar Helen Anton Greta Simon"
)
CITIES = _listed(
    "Ulm Bremen Berlin Paris London Rome Vienna Prague Moscow Lisbon Madrid Oslo Dublin Athens Cairo Hamburg Cologne "
    "Geneva Warsaw Milan"
)
TRADES = _listed(
    "miller tailor baker smith cook gardener soldier fisherman hunter weaver shoemaker teacher doctor singer painter"
)
COLOURS = _listed("red blue green white black golden silver yellow brown grey")
BEASTS = _listed("fox wolf bear cat dog goose horse frog raven hare mouse cow goat lion bird donkey")
THINGS = _listed(
    "key ring lamp book apple rose cup sword hat coat loaf feather letter coin drum basket mirror candle spoon shoe"
)
PLACES = _listed("garden forest kitchen castle mill village church market meadow tower stable cellar bridge river well")
ADJECTIVES = _listed("old young clever poor brave kind little proud merry lazy wise hungry")
SKIES = _listed("sunny rainy cloudy snowy windy foggy")
PEOPLE = _listed("king queen prince princess miller tailor baker hunter soldier gardener fisherman cook shepherd witch")


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words
