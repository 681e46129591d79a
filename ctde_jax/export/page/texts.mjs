// A text grows token by token. A reader gives the logits of what follows, each time of the same tokens and some more.

import { listen, part, say, softmax } from "./common.mjs";

export function readPlaces(card, run) {
  const zeros = (shape) => new Float32Array(shape.reduce((a, b) => a * b, 1));
  let carry = card.carry.map((shape) => ["float32", zeros(shape), [1, ...shape]]);
  let place = 0;
  return async (tokens) => {
    let said;
    while (place < tokens.length) {
      const carried = Object.fromEntries(carry.map((each, index) => [`carry_${index}`, each]));
      said = await run({ inputs: ["int32", [tokens[place++]], [1]], ...carried });
      carry = carry.map(([type, , shape], index) => [type, said[`next_${index}`].data, shape]);
      await breathe();
    }
    return said.outputs.data;
  };
}

export function readWindows(card, run) {
  const [length, vocabulary] = card.output.shape;
  return async (tokens) => {
    const latest = tokens.slice(-length);
    const window = new Int32Array(length); // zeros lie ahead, where no place looks
    window.set(latest);
    const { outputs } = await run({ inputs: ["int32", window, [1, length]] });
    return outputs.data.slice((latest.length - 1) * vocabulary, latest.length * vocabulary);
  };
}

export function startTexts(vocabulary, makeReader) {
  const tokenOf = new Map(vocabulary.map((character, token) => [character, token]));
  let isRunning = false;

  async function goOn() {
    const beginning = part.text.value;
    const fault = findFault(beginning);
    say(fault);
    if (fault) return;
    const [most, temperature, since] = [part.length.valueAsNumber, part.temperature.valueAsNumber, performance.now()];
    const tokens = Array.from(beginning, (character) => tokenOf.get(character));
    const read = makeReader();
    let [written, count] = ["", 0];
    isRunning = part.text.readOnly = true;
    part.go.textContent = "Stop";
    try {
      for (; isRunning && count < most; count++) {
        tokens.push(choose(await read(tokens), temperature));
        written += vocabulary[tokens.at(-1)];
        if (await breathe()) grow(beginning + written);
      }
    } catch (error) {
      say(`The model failed: ${error.message}`);
    }
    grow(beginning + written);
    isRunning = part.text.readOnly = false;
    part.go.textContent = "Continue";
    const speed = Math.round((1000 * count) / (performance.now() - since));
    part.progress.textContent = `${count} characters, ${speed.toLocaleString("en")} a second.`;
  }

  function findFault(text) {
    const strange = [...new Set(text)].filter((character) => !tokenOf.has(character));
    const listed = new Intl.ListFormat("en").format(strange.slice(0, 10).map((character) => JSON.stringify(character)));
    if (strange.length) return `The model has never seen ${listed}: leave out or replace what it does not know.`;
    if (!text) return "The model needs a beginning: write a character or more.";
    return part.length.checkValidity() ? "" : `Length must be a whole number from 1 to ${part.length.max}.`;
  }

  function grow(text) {
    part.text.value = text;
    part.text.scrollTop = part.text.scrollHeight;
  }

  function goOrStop() {
    if (isRunning) isRunning = false;
    else goOn();
  }

  function onKey(event) {
    const isWish = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (isWish || (event.key === "Escape" && isRunning)) goOrStop();
  }

  function showTemperature() {
    part.degrees.value = part.temperature.valueAsNumber.toFixed(2);
  }

  part.title.textContent = "Begin a text, and the model goes on";
  part.text.value = [..."The "].every((character) => tokenOf.has(character)) ? "The " : vocabulary[0];
  part.texts.hidden = false;
  showTemperature();
  listen(part.temperature, { input: showTemperature });
  listen(part.go, { click: goOrStop });
  listen(part.texts, { keydown: onKey });
  return async (tokens) => softmax(await makeReader()(tokens));
}

// The largest logit after Gumbel noise is a draw from their softmax; without noise it is the likeliest.
function choose(logits, temperature) {
  const noise = () => (temperature ? -temperature * Math.log(-Math.log(1 - Math.random())) : 0);
  const noisy = Array.from(logits, (logit) => logit + noise());
  return noisy.indexOf(Math.max(...noisy));
}

let breathed = 0;

// Lets the browser paint and listen, where a picture of the screen is due.
async function breathe() {
  if (performance.now() - breathed < 16) return false;
  await new Promise((done) => setTimeout(done));
  breathed = performance.now();
  return true;
}
