"""The grammar of the embedded data set: every sentence here was checked by hand."""

import datetime
import re
from decimal import Decimal

import pytest

from transformer.data.cldr import generator, grammar, lexicon, locale


def frame_starting(english: str) -> grammar.Template:
    (frame,) = [frame for frame in generator.TEMPLATES if frame.en.startswith(english)]
    return frame


def test_clock_of_every_minute():
    frame = frame_starting("The bus to {city} leaves every")
    for minute in range(24 * 60):
        values = {"city": ("Europe/Paris",), "weekday": (5,), "time": (minute,)}
        english = generator.render(frame, values, "en")
        hour, minutes, half = re.search(r" (\d+):(\d\d) ([AP]M)\.$", english).groups()
        hour24 = int(hour) % 12 + (12 if half == "PM" else 0)
        assert hour24 * 60 + int(minutes) == minute
        french = f"{hour24} h {minutes}" if int(minutes) else f"{hour24} h"
        article = "la" if hour24 == 1 else "las"
        assert [generator.render(frame, values, language) for language in generator.TARGETS] == [
            f"Der Bus nach Paris fährt jeden Samstag um {hour24:02}:{minutes} Uhr ab.",
            f"Le car pour Paris part tous les samedis à {french}.",
            f"El autobús a París sale todos los sábados a {article} {hour24}:{minutes}.",
        ]


def test_date_matches_the_calendar():
    frame = frame_starting("{event:the} will take place")
    values = {"event": ("wedding",), "coming": (datetime.date(2028, 3, 1).toordinal(),), "time": (60,)}
    assert [generator.render(frame, values, language) for language in lexicon.LANGUAGES] == [
        "The wedding will take place on Wednesday, March 1, 2028, at 1:00 AM.",
        "Die Hochzeit findet am Mittwoch, dem 1. März 2028, um 01:00 Uhr statt.",
        "Le mariage aura lieu le mercredi 1er mars 2028 à 1 h.",
        "La boda tendrá lugar el miércoles 1 de marzo de 2028 a la 1:00.",
    ]


@pytest.mark.parametrize(
    ("start", "values", "expected"),
    [
        (
            "{who} bought {things}",
            {
                "who": ("kin", "our", "parents"),
                "things": (21, "ladder", "new"),
                "price": ("GBP", Decimal("1234.5")),
                "city": ("Europe/Athens",),
            },
            (
                "Our parents bought twenty-one new ladders for £1,234.50 in Athens.",
                "Unsere Eltern haben in Athen für 1.234,50 £ einundzwanzig neue Leitern gekauft.",
                "Nos parents ont acheté vingt et une nouvelles échelles à Athènes pour 1 234,50 £GB.",
                "Nuestros padres compraron veintiuna escaleras nuevas en Atenas por 1234,50 GBP.",
            ),
        ),
        (
            "{who} {who:#wants|want} to move",
            {"who": ("pair", "Anna", "Emma"), "country": ("US",), "soon": (2030, 8)},
            (
                "Anna and Emma want to move to the United States in August 2030 because they have found a job there.",
                "Anna und Emma wollen im August 2030 in die Vereinigten Staaten ziehen, "
                "weil sie dort eine Stelle gefunden haben.",
                "Anna et Emma veulent s'installer aux États-Unis en août 2030 parce qu'elles y ont trouvé un emploi.",
                "Anna y Emma quieren mudarse a Estados Unidos en agosto de 2030 porque han encontrado trabajo allí.",
            ),
        ),
        (
            "{who} got up",
            {"who": ("kin", "her", "aunt"), "time": (13 * 60,), "time2": (1,)},
            (
                "Her aunt got up at 1:00 PM although she did not go to bed until 12:01 AM.",
                "Ihre Tante ist um 13:00 Uhr aufgestanden, obwohl sie erst um 00:01 Uhr ins Bett gegangen ist.",
                "Sa tante s'est levée à 13 h bien qu'elle ne se soit couchée qu'à 0 h 01.",
                "Su tía se levantó a las 13:00 aunque no se había acostado hasta las 0:01.",
            ),
        ),
        (
            "{one} gave {one2}",
            {
                "one": ("name", "Paul"),
                "one2": ("kin", "his", "mother"),
                "thing": ("computer", "old"),
                "price": ("EUR", Decimal(99)),
            },
            (
                "Paul gave his mother an old computer that had cost €99.00.",
                "Paul hat seiner Mutter einen alten Computer geschenkt, der 99,00 € gekostet hatte.",
                "Paul a offert à sa mère un vieil ordinateur qui avait coûté 99,00 €.",
                "Paul le regaló a su madre un ordenador viejo que había costado 99,00 €.",
            ),
        ),
        (
            "{thing:the} weighs",
            {"thing": ("carpet", "beautiful"), "weight": ("mass-kilogram", Decimal("1.5")), "who": ("name", "Oscar")},
            (
                "The beautiful carpet weighs 1.5 kilograms, so Oscar cannot carry it.",
                "Der schöne Teppich wiegt 1,5 Kilogramm, deshalb kann Oscar ihn nicht tragen.",
                "Le beau tapis pèse 1,5 kilogramme, donc Oscar ne peut pas le porter.",
                "La alfombra bonita pesa 1,5 kilogramos, así que Oscar no puede llevarla.",
            ),
        ),
        (
            "{who} translated",
            {
                "who": ("pair", "Laura", "Adrian"),
                "language": ("ar",),
                "language2": ("fr",),
                "hours": ("duration-hour", 1),
            },
            (
                "Laura and Adrian translated the letter from Arabic into French in 1 hour.",
                "Laura und Adrian haben den Brief in 1 Stunde aus dem Arabischen ins Französische übersetzt.",
                "Laura et Adrian ont traduit la lettre de l'arabe en français en 1 heure.",
                "Laura y Adrian tradujeron la carta del árabe al francés en 1 hora.",
            ),
        ),
        (
            "{who} {who:#speaks|speak} {language} and",
            {"who": ("name", "David"), "language": ("de",), "language2": ("en",), "language3": ("hu",)},
            (
                "David speaks German and English but does not understand Hungarian.",
                "David spricht Deutsch und Englisch, versteht aber kein Ungarisch.",
                "David parle allemand et anglais, mais ne comprend pas le hongrois.",
                "David habla alemán e inglés, pero no entiende el húngaro.",
            ),
        ),
        (
            "{who} traveled",
            {"who": ("kin", "my", "sister"), "country": ("GB",), "country2": ("NL",), "month": (1999, 4)},
            (
                "My sister traveled from the United Kingdom to the Netherlands in April 1999.",
                "Meine Schwester ist im April 1999 aus dem Vereinigten Königreich in die Niederlande gereist.",
                "En avril 1999, ma sœur est allée du Royaume-Uni aux Pays-Bas.",
                "En abril de 1999, mi hermana viajó del Reino Unido a los Países Bajos.",
            ),
        ),
        (
            "On {weekday}, {many} people",
            {"weekday": (6,), "many": (201,), "event": ("debate",)},
            (
                "On Sunday, two hundred and one people came to the debate.",
                "Am Sonntag kamen zweihunderteins Menschen zur Debatte.",
                "Deux cent une personnes sont venues au débat dimanche.",
                "El domingo vinieron doscientas una personas al debate.",
            ),
        ),
        (
            "It was not until",
            {"ordinal": (13,), "who": ("name", "Emma")},
            (
                "It was not until the thirteenth attempt that Emma passed the exam.",
                "Erst beim dreizehnten Versuch hat Emma die Prüfung bestanden.",
                "Ce n'est qu'à la treizième tentative qu'Emma a réussi l'examen.",
                "Emma no aprobó el examen hasta el décimo tercer intento.",
            ),
        ),
        (
            "For this recipe",
            {
                "food": ("apricots",),
                "mass": ("mass-kilogram", Decimal(1)),
                "drink": ("oil",),
                "volume": ("volume-liter", Decimal("0.5")),
                "small": (2,),
            },
            (
                "For this recipe you need 1 kilogram of apricots, 0.5 liters of oil and two eggs.",
                "Für dieses Rezept braucht man 1 Kilogramm Aprikosen, 0,5 Liter Öl und zwei Eier.",
                "Pour cette recette, il faut 1 kilogramme d'abricots, 0,5 litre d'huile et deux œufs.",
                "Para esta receta se necesitan 1 kilogramo de albaricoques, 0,5 litros de aceite y dos huevos.",
            ),
        ),
    ],
)
def test_sentences_checked_by_hand(start, values, expected):
    frame = frame_starting(start)
    assert tuple(generator.render(frame, values, language) for language in lexicon.LANGUAGES) == expected


@pytest.mark.parametrize(
    ("language", "forms"),
    [
        ("en", ("1 kilometer", "1.5 kilometers", "2 kilometers", "1,234 kilometers", "12,345 kilometers")),
        ("de", ("1 Kilometer", "1,5 Kilometer", "2 Kilometer", "1.234 Kilometer", "12.345 Kilometer")),
        ("fr", ("1 kilomètre", "1,5 kilomètre", "2 kilomètres", "1 234 kilomètres", "12 345 kilomètres")),
        ("es", ("1 kilómetro", "1,5 kilómetros", "2 kilómetros", "1234 kilómetros", "12.345 kilómetros")),
    ],
)
def test_plural_of_units(language, forms):
    numbers = (1, Decimal("1.5"), 2, 1234, 12345)
    assert tuple(locale.quantity("length-kilometer", number, language) for number in numbers) == forms


@pytest.mark.parametrize(
    ("language", "before", "after"),
    [
        ("fr", "de le musée à le hôtel", "du musée à l'hôtel"),
        ("fr", "à les Pays-Bas et de les États-Unis", "aux Pays-Bas et des États-Unis"),
        ("fr", "la église de Italie", "l'église d'Italie"),
        ("fr", "parce que elle dit que Oscar ne est pas là", "parce qu'elle dit qu'Oscar n'est pas là"),
        ("fr", "le onzième, la huitième, de Hongrie, le hongrois, de haut", None),
        ("fr", "une horloge de la gare de Lyon", None),
        ("es", "de el Reino Unido a el museo", "del Reino Unido al museo"),
        ("es", "de él a ella, de El Cairo", None),
        ("es", "alemán y inglés, Francia y Irlanda", "alemán e inglés, Francia e Irlanda"),
        ("es", "leche y hielo, uno y otro", None),
        ("de", "zu der Bank, zu dem Ball, an dem Bahnhof", "zur Bank, zum Ball, am Bahnhof"),
        ("de", "in dem Kino, in das Vereinigte Königreich", "im Kino, ins Vereinigte Königreich"),
        ("de", "in der Schweiz, in den Niederlanden", None),
    ],
)
def test_contractions_and_elisions(language, before, after):
    assert grammar.contract(before, language) == (before if after is None else after)


@pytest.mark.parametrize(
    ("language", "numbers"),
    [
        ("de", {2: ("zwei", "zwei"), 21: ("einundzwanzig",) * 2}),
        ("fr", {21: ("vingt et un", "vingt et une"), 71: ("soixante et onze",) * 2, 80: ("quatre-vingts",) * 2}),
        (
            "es",
            {21: ("veintiún", "veintiuna"), 31: ("treinta y un", "treinta y una"), 500: ("quinientos", "quinientas")},
        ),
    ],
)
def test_spelled_numbers_agree(language, numbers):
    for number, (masculine, feminine) in numbers.items():
        filler = locale.cardinal(number, language)
        assert (f"{filler}", f"{filler:f}") == (masculine, feminine)
