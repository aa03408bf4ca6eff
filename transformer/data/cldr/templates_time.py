"""Sentence frames of the `cldr` data set: journeys and appointments.

`cldr_slots` says what a slot holds, `cldr_grammar.Filler` what the words after its colon choose. Articles that
contract stand apart here ("de le", "a el", "zu der"): `cldr_grammar.contract` joins them in the filled sentence.
"""

from transformer.data.cldr.grammar import Frame

FRAMES = (
    # Travel
    Frame(
        "{who} will fly from {city} to {country} on {weekday} at {time}.",
        "{who} {who:#fliegt|fliegen} am {weekday} um {time} von {city} {country:to}.",
        "{weekday} à {time}, {who} {who:#s'envolera|s'envoleront} de {city} pour {country:the}.",
        "{who} {who:#volará|volarán} de {city} a {country} el {weekday} a {time}.",
    ),
    Frame(
        "The train to {city} leaves from platform {small} at {span:start} and arrives at {span:end}.",
        "Der Zug nach {city} fährt um {span:start} von Gleis {small} ab und kommt um {span:end} an.",
        "Le train pour {city} part de la voie {small} à {span:start} et arrive à {span:end}.",
        "El tren a {city} sale de la vía {small} a {span:start} y llega a {span:end}.",
    ),
    Frame(
        "Because the train was {minutes} late, {who} did not arrive in {city} until {time}.",
        "Weil der Zug {minutes} Verspätung hatte, {who:#kam|kamen} {who} erst um {time} in {city} an.",
        "Comme le train avait {minutes} de retard, {who} "
        "{who:=n'est arrivé|n'est arrivée|ne sont arrivés|ne sont arrivées} à {city} qu'à {time}.",
        "Como el tren llevaba {minutes} de retraso, {who} no {who:#llegó|llegaron} a {city} hasta {time}.",
    ),
    Frame(
        "{who} traveled from {country} to {country2} in {month}.",
        "{who} {who:#ist|sind} im {month} {country:from} {country2:to} gereist.",
        "En {month}, {who} {who:=est allé|est allée|sont allés|sont allées} {country:from} {country2:in}.",
        "En {month}, {who} {who:#viajó|viajaron} de {country} a {country2}.",
    ),
    Frame(
        "{who} {who:#wants|want} to move to {country} in {soon} because {who:he} {who:#has|have} found a job there.",
        "{who} {who:#will|wollen} im {soon} {country:to} ziehen, "
        "weil {who:he} dort eine Stelle gefunden {who:#hat|haben}.",
        "{who} {who:#veut|veulent} s'installer {country:in} en {soon} "
        "parce que {who:he} y {who:#a|ont} trouvé un emploi.",
        "{who} {who:#quiere|quieren} mudarse a {country} en {soon} "
        "porque {who:#ha encontrado|han encontrado} trabajo allí.",
    ),
    Frame(
        "You can fly from {city} to {city2} in {hours} for {price}.",
        "Für {price} kann man in {hours} von {city} nach {city2} fliegen.",
        "Pour {price}, on peut aller de {city} à {city2} en avion en {hours}.",
        "Por {price} se puede volar de {city} a {city2} en {hours}.",
    ),
    Frame(
        "The bus to {city} leaves every {weekday} at {time}.",
        "Der Bus nach {city} fährt jeden {weekday} um {time} ab.",
        "Le car pour {city} part tous les {weekday}s à {time}.",
        "El autobús a {city} sale todos los {weekday:every} a {time}.",
    ),
    Frame(
        "Although {city} is only {distance} from {city2}, the trip takes {hours}.",
        "Obwohl {city} nur {distance} von {city2} entfernt liegt, dauert die Fahrt {hours}.",
        "Bien que {city} ne soit qu'à {distance} de {city2}, le trajet dure {hours}.",
        "Aunque {city} está a solo {distance} de {city2}, el viaje dura {hours}.",
    ),
    Frame(
        "{who} drove {distance} without a break and arrived in {country} on {weekday}.",
        "{who} {who:#ist|sind} {distance} ohne Pause gefahren und am {weekday} {country:in} angekommen.",
        "{who} {who:#a|ont} roulé {distance} sans pause et "
        "{who:=est arrivé|est arrivée|sont arrivés|sont arrivées} {country:in} {weekday}.",
        "{who} {who:#condujo|condujeron} {distance} sin descanso y {who:#llegó|llegaron} a {country} el {weekday}.",
    ),
    Frame(
        "Do you know whether the ferry from {city} arrives before {time} on {weekday}?",
        "Wissen Sie, ob die Fähre aus {city} am {weekday} vor {time} ankommt?",
        "Savez-vous si le ferry de {city} arrive {weekday} avant {time} ?",
        "¿Sabe usted si el ferri de {city} llega el {weekday} antes de {time}?",
    ),
    Frame(
        "{lapse:in}, {who} will return to {country}.",
        "{lapse:in} {who:#kehrt|kehren} {who} {country:to} zurück.",
        "{who} {who:#retournera|retourneront} {country:in} {lapse:in}.",
        "{who} {who:#volverá|volverán} a {country} {lapse:in}.",
    ),
    Frame(
        "{who} promised to come back from {country} on {coming}.",
        "{who} {who:#hat|haben} versprochen, am {coming} {country:from} zurückzukommen.",
        "{who} {who:#a|ont} promis de revenir {country:from} le {coming}.",
        "{who} {who:#prometió|prometieron} volver de {country} el {coming}.",
    ),
    Frame(
        "{who} had been waiting for {minutes} when the bus to {city} finally came.",
        "{who} {who:#wartete|warteten} schon seit {minutes}, als der Bus nach {city} endlich kam.",
        "{who} {who:#attendait|attendaient} depuis {minutes} quand le bus pour {city} est enfin arrivé.",
        "{who} {who:#llevaba|llevaban} {minutes} esperando cuando por fin llegó el autobús a {city}.",
    ),
    # Appointments
    Frame(
        "{event:the} will take place on {coming:weekday}, at {time}.",
        "{event:the} findet am {coming:weekday}, um {time} statt.",
        "{event:the} aura lieu le {coming:weekday} à {time}.",
        "{event:the} tendrá lugar el {coming:weekday} a {time}.",
    ),
    Frame(
        "{event:the} was moved from {weekday} to {weekday2} because {who} {who:#was|were} sick.",
        "{event:the} wurde von {weekday} auf {weekday2} verschoben, weil {who} krank {who:#war|waren}.",
        "{event:the} {event:@a été reporté|a été reportée} de {weekday} à {weekday2} "
        "parce que {who} {who:#était malade|étaient malades}.",
        "{event:the} se aplazó del {weekday} al {weekday2} porque {who} "
        "{who:=estaba enfermo|estaba enferma|estaban enfermos|estaban enfermas}.",
    ),
    Frame(
        "On {weekday}, {who} {who:#has|have} to be {place:at} before {time}.",
        "Am {weekday} {who:#muss|müssen} {who} vor {time} {place:in} sein.",
        "{weekday}, {who} {who:#doit|doivent} être {place:in} avant {time}.",
        "El {weekday}, {who} {who:#tiene|tienen} que estar {place:in} antes de {time}.",
    ),
    Frame(
        "Please call {one} between {span:start} and {span:end}.",
        "Bitte rufen Sie {one:acc} zwischen {span:bare} und {span:end} an.",
        "Veuillez appeler {one} entre {span:start} et {span:end}.",
        "Por favor, llame a {one} entre {span:start} y {span:end}.",
    ),
    Frame(
        "On {weekday:every}, {place:the} is open from {span:start} to {span:end}.",
        "{weekday:every} ist {place:the} von {span:bare} bis {span:end} geöffnet.",
        "{place:the} est {place:@ouvert|ouverte} le {weekday} de {span:start} à {span:end}.",
        "Los {weekday:every}, {place:the} abre desde {span:start} hasta {span:end}.",
    ),
    Frame(
        "{place:the} opens at {time} on {weekday:every} but stays closed on {weekday2:every}.",
        "{place:the} macht {weekday:every} um {time} auf, bleibt aber {weekday2:every} geschlossen.",
        "{place:the} ouvre à {time} le {weekday}, mais reste {place:@fermé|fermée} le {weekday2}.",
        "{place:the} abre a {time} los {weekday:every}, pero permanece {place:@cerrado|cerrada} los {weekday2:every}.",
    ),
    Frame(
        "{who} got up at {time} although {who:he} did not go to bed until {time2}.",
        "{who} {who:#ist|sind} um {time} aufgestanden, "
        "obwohl {who:he} erst um {time2} ins Bett gegangen {who:#ist|sind}.",
        "{who} {who:=s'est levé|s'est levée|se sont levés|se sont levées} à {time} bien que {who:he} ne "
        "{who:=se soit couché|se soit couchée|se soient couchés|se soient couchées} qu'à {time2}.",
        "{who} {who:#se levantó|se levantaron} a {time} "
        "aunque no {who:#se había acostado|se habían acostado} hasta {time2}.",
    ),
    Frame(
        "If {who} {who:#arrives|arrive} after {time}, {place:the} will already be closed.",
        "Wenn {who} nach {time} {who:#ankommt|ankommen}, ist {place:the} schon geschlossen.",
        "Si {who} {who:#arrive|arrivent} après {time}, {place:the} sera déjà {place:@fermé|fermée}.",
        "Si {who} {who:#llega|llegan} después de {time}, {place:the} ya estará {place:@cerrado|cerrada}.",
    ),
    Frame(
        "{event:the} that begins at {span:start} does not end until {span:end}.",
        "{event:the}, {event:rel} um {span:start} beginnt, endet erst um {span:end}.",
        "{event:the} qui commence à {span:start} ne se termine qu'à {span:end}.",
        "{event:the} que empieza a {span:start} no termina hasta {span:end}.",
    ),
    Frame(
        "We would like to reserve a table for {small} people on {weekday} at {time}.",
        "Wir möchten für {weekday} um {time} einen Tisch für {small} Personen reservieren.",
        "Nous voudrions réserver une table pour {small:f} personnes {weekday} à {time}.",
        "Quisiéramos reservar una mesa para {small:f} personas el {weekday} a {time}.",
    ),
    Frame(
        "{who} invited {count} people to {event:the} on {weekday}.",
        "{who} {who:#hat|haben} {count} Leute zu {event:the.dat} am {weekday} eingeladen.",
        "{who} {who:#a|ont} invité {count:f} personnes à {event:the} de {weekday}.",
        "{who} {who:#invitó|invitaron} a {count:f} personas a {event:the} del {weekday}.",
    ),
    Frame(
        "On {weekday}, {many} people came to {event:the}.",
        "Am {weekday} kamen {many} Menschen zu {event:the.dat}.",
        "{many:f} personnes sont venues à {event:the} {weekday}.",
        "El {weekday} vinieron {many:f} personas a {event:the}.",
    ),
)
