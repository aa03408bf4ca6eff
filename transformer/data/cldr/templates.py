"""Sentence templates of the `cldr` data set, in four languages.

`generator.SLOT_TYPES` defines the values of a slot, `grammar.InflectedValue` the format specs after its colon. Articles
are not contracted here ("de le", "a el", "zu der"): `grammar.contract` does that in the rendered sentence.
"""

from transformer.data.cldr.grammar import Template

TIME = (
    # Travel
    Template(
        "{who} will fly from {city} to {country} on {weekday} at {time}.",
        "{who} {who:#fliegt|fliegen} am {weekday} um {time} von {city} {country:to}.",
        "{weekday} à {time}, {who} {who:#s'envolera|s'envoleront} de {city} pour {country:the}.",
        "{who} {who:#volará|volarán} de {city} a {country} el {weekday} a {time}.",
    ),
    Template(
        "The train to {city} leaves from platform {small} at {span:start} and arrives at {span:end}.",
        "Der Zug nach {city} fährt um {span:start} von Gleis {small} ab und kommt um {span:end} an.",
        "Le train pour {city} part de la voie {small} à {span:start} et arrive à {span:end}.",
        "El tren a {city} sale de la vía {small} a {span:start} y llega a {span:end}.",
    ),
    Template(
        "Because the train was {minutes} late, {who} did not arrive in {city} until {time}.",
        "Weil der Zug {minutes} Verspätung hatte, {who:#kam|kamen} {who} erst um {time} in {city} an.",
        "Comme le train avait {minutes} de retard, {who} "
        "{who:=n'est arrivé|n'est arrivée|ne sont arrivés|ne sont arrivées} à {city} qu'à {time}.",
        "Como el tren llevaba {minutes} de retraso, {who} no {who:#llegó|llegaron} a {city} hasta {time}.",
    ),
    Template(
        "{who} traveled from {country} to {country2} in {month}.",
        "{who} {who:#ist|sind} im {month} {country:from} {country2:to} gereist.",
        "En {month}, {who} {who:=est allé|est allée|sont allés|sont allées} {country:from} {country2:in}.",
        "En {month}, {who} {who:#viajó|viajaron} de {country} a {country2}.",
    ),
    Template(
        "{who} {who:#wants|want} to move to {country} in {soon} because {who:he} {who:#has|have} found a job there.",
        "{who} {who:#will|wollen} im {soon} {country:to} ziehen, "
        "weil {who:he} dort eine Stelle gefunden {who:#hat|haben}.",
        "{who} {who:#veut|veulent} s'installer {country:in} en {soon} "
        "parce que {who:he} y {who:#a|ont} trouvé un emploi.",
        "{who} {who:#quiere|quieren} mudarse a {country} en {soon} "
        "porque {who:#ha encontrado|han encontrado} trabajo allí.",
    ),
    Template(
        "You can fly from {city} to {city2} in {hours} for {price}.",
        "Für {price} kann man in {hours} von {city} nach {city2} fliegen.",
        "Pour {price}, on peut aller de {city} à {city2} en avion en {hours}.",
        "Por {price} se puede volar de {city} a {city2} en {hours}.",
    ),
    Template(
        "The bus to {city} leaves every {weekday} at {time}.",
        "Der Bus nach {city} fährt jeden {weekday} um {time} ab.",
        "Le car pour {city} part tous les {weekday}s à {time}.",
        "El autobús a {city} sale todos los {weekday:every} a {time}.",
    ),
    Template(
        "Although {city} is only {distance} from {city2}, the trip takes {hours}.",
        "Obwohl {city} nur {distance} von {city2} entfernt liegt, dauert die Fahrt {hours}.",
        "Bien que {city} ne soit qu'à {distance} de {city2}, le trajet dure {hours}.",
        "Aunque {city} está a solo {distance} de {city2}, el viaje dura {hours}.",
    ),
    Template(
        "{who} drove {distance} without a break and arrived in {country} on {weekday}.",
        "{who} {who:#ist|sind} {distance} ohne Pause gefahren und am {weekday} {country:in} angekommen.",
        "{who} {who:#a|ont} roulé {distance} sans pause et "
        "{who:=est arrivé|est arrivée|sont arrivés|sont arrivées} {country:in} {weekday}.",
        "{who} {who:#condujo|condujeron} {distance} sin descanso y {who:#llegó|llegaron} a {country} el {weekday}.",
    ),
    Template(
        "Do you know whether the ferry from {city} arrives before {time} on {weekday}?",
        "Wissen Sie, ob die Fähre aus {city} am {weekday} vor {time} ankommt?",
        "Savez-vous si le ferry de {city} arrive {weekday} avant {time} ?",
        "¿Sabe usted si el ferri de {city} llega el {weekday} antes de {time}?",
    ),
    Template(
        "{lapse:in}, {who} will return to {country}.",
        "{lapse:in} {who:#kehrt|kehren} {who} {country:to} zurück.",
        "{who} {who:#retournera|retourneront} {country:in} {lapse:in}.",
        "{who} {who:#volverá|volverán} a {country} {lapse:in}.",
    ),
    Template(
        "{who} promised to come back from {country} on {coming}.",
        "{who} {who:#hat|haben} versprochen, am {coming} {country:from} zurückzukommen.",
        "{who} {who:#a|ont} promis de revenir {country:from} le {coming}.",
        "{who} {who:#prometió|prometieron} volver de {country} el {coming}.",
    ),
    Template(
        "{who} had been waiting for {minutes} when the bus to {city} finally came.",
        "{who} {who:#wartete|warteten} schon seit {minutes}, als der Bus nach {city} endlich kam.",
        "{who} {who:#attendait|attendaient} depuis {minutes} quand le bus pour {city} est enfin arrivé.",
        "{who} {who:#llevaba|llevaban} {minutes} esperando cuando por fin llegó el autobús a {city}.",
    ),
    # Appointments
    Template(
        "{event:the} will take place on {coming:weekday}, at {time}.",
        "{event:the} findet am {coming:weekday}, um {time} statt.",
        "{event:the} aura lieu le {coming:weekday} à {time}.",
        "{event:the} tendrá lugar el {coming:weekday} a {time}.",
    ),
    Template(
        "{event:the} was moved from {weekday} to {weekday2} because {who} {who:#was|were} sick.",
        "{event:the} wurde von {weekday} auf {weekday2} verschoben, weil {who} krank {who:#war|waren}.",
        "{event:the} {event:@a été reporté|a été reportée} de {weekday} à {weekday2} "
        "parce que {who} {who:#était malade|étaient malades}.",
        "{event:the} se aplazó del {weekday} al {weekday2} porque {who} "
        "{who:=estaba enfermo|estaba enferma|estaban enfermos|estaban enfermas}.",
    ),
    Template(
        "On {weekday}, {who} {who:#has|have} to be {place:at} before {time}.",
        "Am {weekday} {who:#muss|müssen} {who} vor {time} {place:in} sein.",
        "{weekday}, {who} {who:#doit|doivent} être {place:in} avant {time}.",
        "El {weekday}, {who} {who:#tiene|tienen} que estar {place:in} antes de {time}.",
    ),
    Template(
        "Please call {one} between {span:start} and {span:end}.",
        "Bitte rufen Sie {one:acc} zwischen {span:bare} und {span:end} an.",
        "Veuillez appeler {one} entre {span:start} et {span:end}.",
        "Por favor, llame a {one} entre {span:start} y {span:end}.",
    ),
    Template(
        "On {weekday:every}, {place:the} is open from {span:start} to {span:end}.",
        "{weekday:every} ist {place:the} von {span:bare} bis {span:end} geöffnet.",
        "{place:the} est {place:@ouvert|ouverte} le {weekday} de {span:start} à {span:end}.",
        "Los {weekday:every}, {place:the} abre desde {span:start} hasta {span:end}.",
    ),
    Template(
        "{place:the} opens at {time} on {weekday:every} but stays closed on {weekday2:every}.",
        "{place:the} macht {weekday:every} um {time} auf, bleibt aber {weekday2:every} geschlossen.",
        "{place:the} ouvre à {time} le {weekday}, mais reste {place:@fermé|fermée} le {weekday2}.",
        "{place:the} abre a {time} los {weekday:every}, pero permanece {place:@cerrado|cerrada} los {weekday2:every}.",
    ),
    Template(
        "{who} got up at {time} although {who:he} did not go to bed until {time2}.",
        "{who} {who:#ist|sind} um {time} aufgestanden, "
        "obwohl {who:he} erst um {time2} ins Bett gegangen {who:#ist|sind}.",
        "{who} {who:=s'est levé|s'est levée|se sont levés|se sont levées} à {time} bien que {who:he} ne "
        "{who:=se soit couché|se soit couchée|se soient couchés|se soient couchées} qu'à {time2}.",
        "{who} {who:#se levantó|se levantaron} a {time} "
        "aunque no {who:#se había acostado|se habían acostado} hasta {time2}.",
    ),
    Template(
        "If {who} {who:#arrives|arrive} after {time}, {place:the} will already be closed.",
        "Wenn {who} nach {time} {who:#ankommt|ankommen}, ist {place:the} schon geschlossen.",
        "Si {who} {who:#arrive|arrivent} après {time}, {place:the} sera déjà {place:@fermé|fermée}.",
        "Si {who} {who:#llega|llegan} después de {time}, {place:the} ya estará {place:@cerrado|cerrada}.",
    ),
    Template(
        "{event:the} that begins at {span:start} does not end until {span:end}.",
        "{event:the}, {event:rel} um {span:start} beginnt, endet erst um {span:end}.",
        "{event:the} qui commence à {span:start} ne se termine qu'à {span:end}.",
        "{event:the} que empieza a {span:start} no termina hasta {span:end}.",
    ),
    Template(
        "We would like to reserve a table for {small} people on {weekday} at {time}.",
        "Wir möchten für {weekday} um {time} einen Tisch für {small} Personen reservieren.",
        "Nous voudrions réserver une table pour {small:f} personnes {weekday} à {time}.",
        "Quisiéramos reservar una mesa para {small:f} personas el {weekday} a {time}.",
    ),
    Template(
        "{who} invited {count} people to {event:the} on {weekday}.",
        "{who} {who:#hat|haben} {count} Leute zu {event:the.dat} am {weekday} eingeladen.",
        "{who} {who:#a|ont} invité {count:f} personnes à {event:the} de {weekday}.",
        "{who} {who:#invitó|invitaron} a {count:f} personas a {event:the} del {weekday}.",
    ),
    Template(
        "On {weekday}, {many} people came to {event:the}.",
        "Am {weekday} kamen {many} Menschen zu {event:the.dat}.",
        "{many:f} personnes sont venues à {event:the} {weekday}.",
        "El {weekday} vinieron {many:f} personas a {event:the}.",
    ),
)


LIFE = (
    # Money
    Template(
        "{who} bought {things} for {price} in {city}.",
        "{who} {who:#hat|haben} in {city} für {price} {things} gekauft.",
        "{who} {who:#a|ont} acheté {things} à {city} pour {price}.",
        "{who} {who:#compró|compraron} {things} en {city} por {price}.",
    ),
    Template(
        "{thing:the} costs {price} more than {thing2:the}.",
        "{thing:the} kostet {price} mehr als {thing2:the}.",
        "{thing:the} coûte {price} de plus que {thing2:the}.",
        "{thing:the} cuesta {price} más que {thing2:the}.",
    ),
    Template(
        "How much does {thing:the} cost in {country}?",
        "Wie viel kostet {thing:the} {country:in}?",
        "Combien coûte {thing:the} {country:in} ?",
        "¿Cuánto cuesta {thing:the} en {country}?",
    ),
    Template(
        "{one} gave {one2} {thing:a} that had cost {price}.",
        "{one} hat {one2:dat} {thing:a.acc} geschenkt, {thing:rel} {price} gekostet hatte.",
        "{one} a offert à {one2} {thing:a} qui avait coûté {price}.",
        "{one} le regaló a {one2} {thing:a} que había costado {price}.",
    ),
    Template(
        "Prices in {country} rose by {percent} in {year}.",
        "{country:in} sind die Preise im Jahr {year} um {percent} gestiegen.",
        "{country:in}, les prix ont augmenté de {percent} en {year}.",
        "En {year}, los precios subieron un {percent} en {country}.",
    ),
    Template(
        "{one} lent {one2} {sum} and wants the money back before {coming}.",
        "{one} hat {one2:dat} {sum} geliehen und will das Geld vor dem {coming} zurückhaben.",
        "{one} a prêté {sum} à {one2} et veut récupérer l'argent avant le {coming}.",
        "{one} le prestó {sum} a {one2} y quiere recuperar el dinero antes del {coming}.",
    ),
    Template(
        "At the market you can get {mass} of {food} for {price}.",
        "Auf dem Markt bekommt man {mass} {food} für {price}.",
        "Au marché, on peut avoir {mass} de {food} pour {price}.",
        "En el mercado dan {mass} de {food} por {price}.",
    ),
    Template(
        "The hotel in {city} charges {price} per night for a room with {small} beds.",
        "Das Hotel in {city} verlangt für ein Zimmer mit {small} Betten {price} pro Nacht.",
        "L'hôtel de {city} demande {price} par nuit pour une chambre à {small} lits.",
        "El hotel de {city} cobra {price} por noche por una habitación de {small} camas.",
    ),
    Template(
        "{who} had to pay {sum} because {who:he} had lost {thing:the}.",
        "{who} {who:#musste|mussten} {sum} bezahlen, weil {who:he} {thing:the.acc} verloren {who:#hatte|hatten}.",
        "{who} {who:#a|ont} dû payer {sum} parce que {who:he} {who:#avait|avaient} perdu {thing:the}.",
        "{who} {who:#tuvo|tuvieron} que pagar {sum} porque {who:#había|habían} perdido {thing:the}.",
    ),
    Template(
        "Do you have {thing:a} for less than {price}?",
        "Haben Sie {thing:a.acc} für weniger als {price}?",
        "Avez-vous {thing:a} à moins de {price} ?",
        "¿Tiene usted {thing:a} por menos de {price}?",
    ),
    Template(
        "Would you rather have {thing:a} or {thing2:a}?",
        "Möchten Sie lieber {thing:a.acc} oder {thing2:a.acc}?",
        "Préférez-vous {thing:a} ou {thing2:a} ?",
        "¿Prefiere usted {thing:a} o {thing2:a}?",
    ),
    # Measures
    Template(
        "For this recipe you need {mass} of {food}, {volume} of {drink} and {small} eggs.",
        "Für dieses Rezept braucht man {mass} {food}, {volume} {drink} und {small} Eier.",
        "Pour cette recette, il faut {mass} de {food}, {volume} de {drink} et {small} œufs.",
        "Para esta receta se necesitan {mass} de {food}, {volume} de {drink} y {small} huevos.",
    ),
    Template(
        "The bridge in {city} is {meters:high} long and {meters:low} wide.",
        "Die Brücke in {city} ist {meters:high} lang und {meters:low} breit.",
        "Le pont de {city} fait {meters:high} de long sur {meters:low} de large.",
        "El puente de {city} mide {meters:high} de largo y {meters:low} de ancho.",
    ),
    Template(
        "The tower in {city} is {meters:high} high and thus taller than the one in {city2}, "
        "which is only {meters:low} high.",
        "Der Turm in {city} ist {meters:high} hoch und damit höher als der in {city2}, der nur {meters:low} hoch ist.",
        "La tour de {city} mesure {meters:high} de haut et est donc plus haute que celle de {city2}, "
        "qui mesure seulement {meters:low}.",
        "La torre de {city} mide {meters:high} de alto y por tanto es más alta que la de {city2}, "
        "que solo mide {meters:low}.",
    ),
    Template(
        "{thing:the} weighs {weight}, so {who} cannot carry it.",
        "{thing:the} wiegt {weight}, deshalb {who:#kann|können} {who} {thing:it.acc} nicht tragen.",
        "{thing:the} pèse {weight}, donc {who} ne {who:#peut|peuvent} pas {thing:@le|la} porter.",
        "{thing:the} pesa {weight}, así que {who} no {who:#puede|pueden} {thing:@llevarlo|llevarla}.",
    ),
    Template(
        "On {weekday} it was {degrees:high} in {city}, but only {degrees:low} in {city2}.",
        "Am {weekday} waren es in {city} {degrees:high}, in {city2} aber nur {degrees:low}.",
        "{weekday}, il faisait {degrees:high} à {city}, mais seulement {degrees:low} à {city2}.",
        "El {weekday} hubo {degrees:high} en {city}, pero solo {degrees:low} en {city2}.",
    ),
    Template(
        "The police stopped {one} near {city} because {one:he} was driving at {speed}.",
        "{one} wurde in der Nähe von {city} von der Polizei angehalten, weil {one:he} {speed} fuhr.",
        "La police a arrêté {one} près de {city} parce que {one:he} roulait à {speed}.",
        "La policía detuvo a {one} cerca de {city} porque conducía a {speed}.",
    ),
    Template(
        "{who} {who:#is|are} renting an apartment of {area} in {city}.",
        "{who} {who:#mietet|mieten} in {city} eine {area} große Wohnung.",
        "{who} {who:#loue|louent} un appartement de {area} à {city}.",
        "{who} {who:#alquila|alquilan} un piso de {area} en {city}.",
    ),
    Template(
        "On {weekday}, {who} downloaded {count} pictures, {data} in all.",
        "Am {weekday} {who:#hat|haben} {who} {count} Bilder heruntergeladen, insgesamt {data}.",
        "{weekday}, {who} {who:#a|ont} téléchargé {count:f} images, soit {data} au total.",
        "El {weekday}, {who} {who:#descargó|descargaron} {count:f} imágenes, {data} en total.",
    ),
    Template(
        "There are {things} {place:in}.",
        "{place:in} gibt es {things}.",
        "Il y a {things} {place:in}.",
        "Hay {things} {place:in}.",
    ),
    Template(
        "In {country}, {shares:high} of students speak {language}, but only {shares:low} understand {language2}.",
        "{country:in} sprechen {shares:high} der Studenten {language}, aber nur {shares:low} verstehen {language2}.",
        "{country:in}, {shares:high} des étudiants parlent {language}, "
        "mais seulement {shares:low} comprennent {language2:the}.",
        "En {country}, el {shares:high} de los estudiantes habla {language}, "
        "pero solo el {shares:low} entiende {language2:the}.",
    ),
    Template(
        "In {year}, {city} had {inhabitants} inhabitants.",
        "Im Jahr {year} hatte {city} {inhabitants} Einwohner.",
        "En {year}, {city} comptait {inhabitants} habitants.",
        "En {year}, {city} tenía {inhabitants} habitantes.",
    ),
    Template(
        "{one} is {years} years older than {one2} but {centimeters} shorter.",
        "{one} ist {years} Jahre älter als {one2}, aber {centimeters} kleiner.",
        "{one} a {years} ans de plus que {one2}, mais mesure {centimeters} de moins.",
        "{one} tiene {years} años más que {one2}, pero mide {centimeters} menos.",
    ),
    # Languages and books
    Template(
        "{who} {who:#speaks|speak} {language} and {language2} but {who:#does|do} not understand {language3}.",
        "{who} {who:#spricht|sprechen} {language} und {language2}, {who:#versteht|verstehen} aber kein {language3}.",
        "{who} {who:#parle|parlent} {language} et {language2}, "
        "mais ne {who:#comprend|comprennent} pas {language3:the}.",
        "{who} {who:#habla|hablan} {language} y {language2}, pero no {who:#entiende|entienden} {language3:the}.",
    ),
    Template(
        "{who} {who:#has|have} been learning {language} for {years} years because {who:he} "
        "{who:#wants|want} to work in {country}.",
        "{who} {who:#lernt|lernen} seit {years} Jahren {language}, weil {who:he} {country:in} "
        "arbeiten {who:#will|wollen}.",
        "{who} {who:#apprend|apprennent} {language:the} depuis {years} ans "
        "parce que {who:he} {who:#veut|veulent} travailler {country:in}.",
        "{who} {who:#estudia|estudian} {language} desde hace {years} años "
        "porque {who:#quiere|quieren} trabajar en {country}.",
    ),
    Template(
        "{who} translated the letter from {language} into {language2} in {hours}.",
        "{who} {who:#hat|haben} den Brief in {hours} {language:from} {language2:into} übersetzt.",
        "{who} {who:#a|ont} traduit la lettre de {language:the} en {language2} en {hours}.",
        "{who} {who:#tradujo|tradujeron} la carta de {language:the} a {language2:the} en {hours}.",
    ),
    Template(
        "This book was published in {country} in {year} and has been translated into {count} languages.",
        "Dieses Buch ist im Jahr {year} {country:in} erschienen und in {count} Sprachen übersetzt worden.",
        "Ce livre a été publié {country:in} en {year} et a été traduit en {count:f} langues.",
        "Este libro se publicó en {country} en {year} y se ha traducido a {count} idiomas.",
    ),
    Template(
        "{who} asked me whether {language} is spoken in {country}.",
        "{who} {who:#hat|haben} mich gefragt, ob man {country:in} {language} spricht.",
        "{who} {who:#m'a|m'ont} demandé si on parle {language} {country:in}.",
        "{who} me {who:#preguntó|preguntaron} si en {country} se habla {language}.",
    ),
    # Lives
    Template(
        "{one} was born in {city} on {past}.",
        "{one} wurde am {past} in {city} geboren.",
        "{one} {one:@est né|est née} à {city} le {past}.",
        "{one} nació en {city} el {past}.",
    ),
    Template(
        "{one} will turn {count} on {coming}.",
        "{one} wird am {coming} {count} Jahre alt.",
        "{one} aura {count} ans le {coming}.",
        "{one} cumplirá {count} años el {coming}.",
    ),
    Template(
        "On {past}, {one} celebrated {one:@his|her} {ordinal} wedding anniversary in {city}.",
        "Am {past} hat {one} in {city} {one:@seinen|ihren} {ordinal:dat} Hochzeitstag gefeiert.",
        "Le {past}, {one} a fêté son {ordinal} anniversaire de mariage à {city}.",
        "El {past}, {one} celebró en {city} su {ordinal} aniversario de boda.",
    ),
    Template(
        "{who} bought seats in the {ordinal} row for {event:the} on {weekday}.",
        "Für {event:the.acc} am {weekday} {who:#hat|haben} {who} Plätze in der {ordinal:dat} Reihe gekauft.",
        "Pour {event:the} de {weekday}, {who} {who:#a|ont} acheté des places au {ordinal} rang.",
        "Para {event:the} del {weekday}, {who} {who:#compró|compraron} entradas en la {ordinal:f} fila.",
    ),
    Template(
        "It was not until the {ordinal} attempt that {who} passed the exam.",
        "Erst beim {ordinal:dat} Versuch {who:#hat|haben} {who} die Prüfung bestanden.",
        "Ce n'est qu'à la {ordinal:f} tentative que {who} {who:#a|ont} réussi l'examen.",
        "{who} no {who:#aprobó|aprobaron} el examen hasta el {ordinal} intento.",
    ),
    Template(
        "The king died on {past}, after he had ruled for {years} years.",
        "Der König starb am {past}, nachdem er {years} Jahre lang regiert hatte.",
        "Le roi est mort le {past} après avoir régné pendant {years} ans.",
        "El rey murió el {past} después de haber reinado durante {years} años.",
    ),
    Template(
        "{who} visited {one} in {city} {lapse:ago}.",
        "{who} {who:#hat|haben} {one:acc} {lapse:ago} in {city} besucht.",
        "{who} {who:#a|ont} rendu visite à {one} à {city} {lapse:ago}.",
        "{who} {who:#visitó|visitaron} a {one} en {city} {lapse:ago}.",
    ),
    Template(
        "I did not know that {who} had been living in {country} since {month}.",
        "Ich wusste nicht, dass {who} seit {month} {country:in} {who:#wohnt|wohnen}.",
        "Je ne savais pas que {who} {who:#vivait|vivaient} {country:in} depuis {month}.",
        "No sabía que {who} {who:#vivía|vivían} en {country} desde {month}.",
    ),
    Template(
        "{who} {who:#says|say} that {thing:the} was made in {country}.",
        "{who} {who:#sagt|sagen}, dass {thing:the} {country:in} hergestellt wurde.",
        "{who} {who:#dit|disent} que {thing:the} {thing:@a été fabriqué|a été fabriquée} {country:in}.",
        "{who} {who:#dice|dicen} que {thing:the} se fabricó en {country}.",
    ),
    Template(
        "Yesterday {who} left {thing:the} {place:at}.",
        "Gestern {who:#hat|haben} {who} {thing:the.acc} {place:in} vergessen.",
        "Hier, {who} {who:#a|ont} oublié {thing:the} {place:in}.",
        "Ayer {who} {who:#olvidó|olvidaron} {thing:the} {place:in}.",
    ),
)
