"""The word tables of the `cldr` data set: nouns with their gender, adjectives and names in four languages."""

from typing import NamedTuple

LANGUAGES = ("en", "de", "fr", "es")


class Noun(NamedTuple):
    """A noun in one language; gender m, f or n, or p for a noun of persons used only in the plural."""

    gender: str
    singular: str
    plural: str


class Adjective(NamedTuple):
    """An adjective in one language. German is the bare stem; a French one may stand before its noun."""

    masculine: str
    feminine: str
    before_vowel: str
    comes_first: bool


def _rows(table: str) -> list[list[list[str]]]:
    """Rows of cells of words; an underscore joins the words of one name."""
    return [
        [[word.replace("_", " ") for word in cell.split()] for cell in row.split("|")]
        for row in table.strip().splitlines()
    ]


def _read_nouns(table: str) -> dict[str, dict[str, Noun]]:
    """{English: {language: noun}} from cells `gender singular [plural]`, the English cell without gender."""
    return {
        cells[0][0]: {
            language: Noun(cell[0], cell[1], cell[-1])
            for language, cell in zip(LANGUAGES, [["m", *cells[0]], *cells[1:]], strict=True)
        }
        for cells in _rows(table)
    }


def _read_adjectives(table: str) -> dict[str, dict[str, Adjective]]:
    """{English: {language: adjective}} from cells `[<]masculine [feminine [before a vowel]]`."""
    return {
        cells[0][0]: {
            language: Adjective(
                cell[0].lstrip("<"),
                cell[min(1, len(cell) - 1)].lstrip("<"),
                (cell[2] if len(cell) > 2 else cell[0]).lstrip("<"),
                cell[0].startswith("<"),
            )
            for language, cell in zip(LANGUAGES, cells, strict=True)
        }
        for cells in _rows(table)
    }


THINGS = _read_nouns("""
book books | n Buch Bücher | m livre livres | m libro libros
lamp lamps | f Lampe Lampen | f lampe lampes | f lámpara lámparas
chair chairs | m Stuhl Stühle | f chaise chaises | f silla sillas
table tables | m Tisch Tische | f table tables | f mesa mesas
watch watches | f Uhr Uhren | f montre montres | m reloj relojes
bicycle bicycles | n Fahrrad Fahrräder | m vélo vélos | f bicicleta bicicletas
umbrella umbrellas | m Regenschirm Regenschirme | m parapluie parapluies | m paraguas paraguas
suitcase suitcases | m Koffer Koffer | f valise valises | f maleta maletas
coat coats | m Mantel Mäntel | m manteau manteaux | m abrigo abrigos
hat hats | m Hut Hüte | m chapeau chapeaux | m sombrero sombreros
dress dresses | n Kleid Kleider | f robe robes | m vestido vestidos
shirt shirts | n Hemd Hemden | f chemise chemises | f camisa camisas
bag bags | f Tasche Taschen | m sac sacs | m bolso bolsos
bottle bottles | f Flasche Flaschen | f bouteille bouteilles | f botella botellas
plate plates | m Teller Teller | f assiette assiettes | m plato platos
key keys | m Schlüssel Schlüssel | f clé clés | f llave llaves
painting paintings | n Gemälde Gemälde | m tableau tableaux | m cuadro cuadros
mirror mirrors | m Spiegel Spiegel | m miroir miroirs | m espejo espejos
guitar guitars | f Gitarre Gitarren | f guitare guitares | f guitarra guitarras
computer computers | m Computer Computer | m ordinateur ordinateurs | m ordenador ordenadores
camera cameras | f Kamera Kameras | m appareil_photo appareils_photo | f cámara cámaras
carpet carpets | m Teppich Teppiche | m tapis tapis | f alfombra alfombras
notebook notebooks | n Heft Hefte | m cahier cahiers | m cuaderno cuadernos
box boxes | f Kiste Kisten | f caisse caisses | f caja cajas
ladder ladders | f Leiter Leitern | f échelle échelles | f escalera escaleras
pillow pillows | n Kissen Kissen | m oreiller oreillers | f almohada almohadas
ring rings | m Ring Ringe | f bague bagues | m anillo anillos
knife knives | n Messer Messer | m couteau couteaux | m cuchillo cuchillos
toy toys | n Spielzeug Spielzeuge | m jouet jouets | m juguete juguetes
basket baskets | m Korb Körbe | m panier paniers | f cesta cestas
armchair armchairs | m Sessel Sessel | m fauteuil fauteuils | m sillón sillones
clock clocks | f Wanduhr Wanduhren | f horloge horloges | m reloj_de_pared relojes_de_pared
""")

EVENTS = _read_nouns("""
meeting | f Sitzung | f réunion | f reunión
concert | n Konzert | m concert | m concierto
lecture | m Vortrag | f conférence | f conferencia
wedding | f Hochzeit | m mariage | f boda
exhibition | f Ausstellung | f exposition | f exposición
party | f Feier | f fête | f fiesta
course | m Kurs | m cours | m curso
game | n Spiel | m match | m partido
performance | f Vorstellung | f représentation | f función
opera | f Oper | m opéra | f ópera
press_conference | f Pressekonferenz | f conférence_de_presse | f rueda_de_prensa
ceremony | f Zeremonie | f cérémonie | f ceremonia
auction | f Versteigerung | f vente_aux_enchères | f subasta
debate | f Debatte | m débat | m debate
ball | m Ball | m bal | m baile
""")

PLACES = _read_nouns("""
museum | n Museum | m musée | m museo
library | f Bibliothek | f bibliothèque | f biblioteca
station | m Bahnhof | f gare | f estación
airport | m Flughafen | m aéroport | m aeropuerto
school | f Schule | f école | f escuela
office | n Büro | m bureau | f oficina
pharmacy | f Apotheke | f pharmacie | f farmacia
bank | f Bank | f banque | m banco
theater | n Theater | m théâtre | m teatro
restaurant | n Restaurant | m restaurant | m restaurante
university | f Universität | f université | f universidad
swimming_pool | n Schwimmbad | f piscine | f piscina
town_hall | n Rathaus | f mairie | m ayuntamiento
hotel | n Hotel | m hôtel | m hotel
embassy | f Botschaft | f ambassade | f embajada
cinema | n Kino | m cinéma | m cine
bakery | f Bäckerei | f boulangerie | f panadería
church | f Kirche | f église | f iglesia
supermarket | m Supermarkt | m supermarché | m supermercado
factory | f Fabrik | f usine | f fábrica
""")
# One is rather at than in these places, in English as in German: am Bahnhof.
EDGE_PLACES = frozenset({"station", "airport"})

FOODS = _read_nouns("""
potatoes | p Kartoffeln | p pommes_de_terre | p patatas
apples | p Äpfel | p pommes | p manzanas
oranges | p Orangen | p oranges | p naranjas
flour | n Mehl | f farine | f harina
sugar | m Zucker | m sucre | m azúcar
rice | m Reis | m riz | m arroz
cheese | m Käse | m fromage | m queso
onions | p Zwiebeln | p oignons | p cebollas
tomatoes | p Tomaten | p tomates | p tomates
grapes | p Trauben | m raisin | p uvas
butter | f Butter | m beurre | f mantequilla
carrots | p Karotten | p carottes | p zanahorias
cherries | p Kirschen | p cerises | p cerezas
nuts | p Nüsse | p noix | p nueces
strawberries | p Erdbeeren | p fraises | p fresas
apricots | p Aprikosen | p abricots | p albaricoques
garlic | m Knoblauch | m ail | m ajo
""")

DRINKS = _read_nouns("""
milk | f Milch | m lait | f leche
water | n Wasser | f eau | f agua
oil | n Öl | f huile | m aceite
wine | m Wein | m vin | m vino
juice | m Saft | m jus | m zumo
cream | f Sahne | f crème | f nata
vinegar | m Essig | m vinaigre | m vinagre
beer | n Bier | f bière | f cerveza
""")

KIN = _read_nouns("""
brother | m Bruder | m frère | m hermano
sister | f Schwester | f sœur | f hermana
mother | f Mutter | f mère | f madre
father | m Vater | m père | m padre
uncle | m Onkel | m oncle | m tío
aunt | f Tante | f tante | f tía
grandmother | f Großmutter | f grand-mère | f abuela
grandfather | m Großvater | m grand-père | m abuelo
daughter | f Tochter | f fille | f hija
son | m Sohn | m fils | m hijo
""")

FAMILIES = _read_nouns("""
parents | p Eltern | p parents | p padres
grandparents | p Großeltern | p grands-parents | p abuelos
children | p Kinder | p enfants | p hijos
friends | p Freunde | p amis | p amigos
neighbors | p Nachbarn | p voisins | p vecinos
""")

ADJECTIVES = _read_adjectives("""
red | rot | rouge | rojo roja
green | grün | vert verte | verde
blue | blau | bleu bleue | azul
black | schwarz | noir noire | negro negra
white | weiß | blanc blanche | blanco blanca
yellow | gelb | jaune | amarillo amarilla
gray | grau | gris grise | gris
small | klein | <petit petite | pequeño pequeña
large | groß | <grand grande | grande
new | neu | <nouveau nouvelle nouvel | nuevo nueva
old | alt | <vieux vieille vieil | viejo vieja
beautiful | schön | <beau belle bel | bonito bonita
pretty | hübsch | <joli jolie | lindo linda
expensive | teur | cher chère | caro cara
round | rund | rond ronde | redondo redonda
strange | seltsam | étrange | extraño extraña
modern | modern | moderne | moderno moderna
elegant | elegant | élégant élégante | elegante
heavy | schwer | lourd lourde | pesado pesada
light | leicht | léger légère | ligero ligera
""")

NAMES = {
    "m": ("Paul", "Thomas", "Daniel", "Martin", "Lucas", "David", "Oscar", "Adrian"),
    "f": ("Anna", "Maria", "Laura", "Sophie", "Emma", "Clara", "Olivia", "Julia"),
}

# Territories with their article in German (f, n, plural or none) and French (f, m, plural or none).
TERRITORIES = {
    code: (german, french)
    for row in _rows("""
FR - f | DE - f | IT - f | ES - f | PT - m | CH f f | AT - f | BE - f | NL p p | PL - f | CZ - f | SK f f | HU - f
RO - f | BG - f | GR - f | HR - f | RS - f | UA f f | SE - f | NO - f | DK - m | FI - f | IS - f | IE - f | GB n m
US p p | CA - m | MX - m | BR - m | AR - f | CL - m | PE - m | CU - - | JP - m | CN - f | KR - f | IN - f | TH - f
VN - m | TR f f | EG - f | MA - m | SN - m | KE - m | ZA - f | AU - f | NZ - f | PH p p | MT - - | MN f f
""")
    for code, german, french in row
}
TERRITORY_ARTICLES = {
    "en": {"GB": "the ", "NL": "the ", "PH": "the ", "US": "the "},
    "es": {"GB": "el ", "NL": "los "},
}

# CLDR names a city in every language as the example of a time zone.
CITY_ZONES = tuple(
    f"{area}/{city.replace(' ', '_')}"
    for (area,), cities in _rows("""
Europe | Vienna Paris London Moscow Lisbon Athens Rome Warsaw Prague Brussels Copenhagen Zurich Berlin Madrid
Europe | Istanbul Budapest Belgrade Stockholm Bucharest Amsterdam Dublin
Asia | Tokyo Seoul Beirut
Africa | Algiers
America | New_York
""")
    for city in cities
)
SPOKEN = tuple(_rows("de fr es en it pt nl pl ru ja zh ko ar tr sv da fi el cs hu no uk ro")[0][0])
