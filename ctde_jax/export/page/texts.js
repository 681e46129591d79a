// Generates text token by token. A reader returns the logits of the next token for the tokens so far, which extend
// those of its previous call; or null if generation has been stopped.

import { listen, part, say, softmax } from "./common.js";

export function readPlaces(card, run, isWanted) {
  const zeros = (shape) => new Float32Array(shape.reduce((a, b) => a * b, 1));
  let carry = card.carry.map((shape) => ["float32", zeros(shape), [1, ...shape]]);
  let place = 0;
  return async (tokens) => {
    let results;
    while (place < tokens.length) {
      if (!isWanted()) return null;
      const carried = Object.fromEntries(carry.map((each, index) => [`carry_${index}`, each]));
      results = await run({ inputs: ["int32", [tokens[place++]], [1]], ...carried });
      carry = carry.map(([type, , shape], index) => [type, results[`next_${index}`].data, shape]);
      await breathe();
    }
    return results.outputs.data;
  };
}

export function readWindows(card, run) {
  const [length, vocabulary] = card.output.shape;
  return async (tokens) => {
    const latest = tokens.slice(-length);
    const window = new Int32Array(length); // the zeros at the end are masked by causal attention
    window.set(latest);
    const { outputs } = await run({ inputs: ["int32", window, [1, length]] });
    return outputs.data.slice((latest.length - 1) * vocabulary, latest.length * vocabulary);
  };
}

export function startTexts(vocabulary, makeReader) {
  const tokenOf = new Map(vocabulary.map((character, token) => [character, token]));
  const lineEnd = tokenOf.has("\r") ? (tokenOf.has("\n") ? "\r\n" : "\r") : "\n"; // a text box has "\n" for all
  let isRunning = false;
  let isWanted = false;

  async function generate() {
    const beginning = part.text.value;
    const fault = findFault(beginning);
    say(fault);
    if (fault) return;
    const [most, temperature, since] = [part.length.valueAsNumber, part.temperature.valueAsNumber, performance.now()];
    const tokens = toTokens(beginning);
    const read = makeReader(() => isWanted);
    let [written, count] = ["", 0];
    isRunning = isWanted = part.text.readOnly = true;
    part.go.textContent = "Stop";
    try {
      for (; isWanted && count < most; count++) {
        const logits = await read(tokens);
        if (!logits) break;
        tokens.push(choose(logits, temperature));
        written += vocabulary[tokens.at(-1)];
        if (await breathe()) grow(beginning + written);
      }
    } catch (error) {
      say(`The model failed: ${error.message}`);
    }
    grow(beginning + written);
    isRunning = isWanted = part.text.readOnly = false;
    part.go.textContent = "Continue";
    const speed = Math.round((1000 * count) / (performance.now() - since));
    part.progress.textContent = `${count} characters, ${speed.toLocaleString("en")} per second.`;
  }

  function toTokens(text) {
    return Array.from(text.replaceAll("\n", lineEnd), (character) => tokenOf.get(character));
  }

  function findFault(text) {
    const strange = [...new Set(text.replaceAll("\n", lineEnd))].filter((character) => !tokenOf.has(character));
    const listed = new Intl.ListFormat("en").format(strange.slice(0, 10).map(nameOf));
    if (strange.length) return `The model's vocabulary does not contain ${listed}: remove or replace these characters.`;
    if (!text) return "The model needs a prompt: enter at least one character.";
    return part.length.checkValidity() ? "" : `Length must be a whole number from 1 to ${part.length.max}.`;
  }

  function grow(text) {
    part.text.value = text;
    part.text.scrollTop = part.text.scrollHeight;
  }

  function goOrStop() {
    if (isRunning) isWanted = false;
    else generate();
  }

  function onKey(event) {
    const isWish = event.key === "Enter" && (event.ctrlKey || event.metaKey);
    if (!isWish && !(event.key === "Escape" && isRunning)) return;
    event.preventDefault(); // of a button, too, which Enter presses
    if (!event.repeat) goOrStop();
  }

  function showTemperature() {
    part.degrees.value = part.temperature.valueAsNumber.toFixed(2);
  }

  part.title.textContent = "Begin a text, and the model continues it";
  part.text.value = [..."The "].every((character) => tokenOf.has(character)) ? "The " : vocabulary[0];
  part.texts.hidden = false;
  showTemperature();
  listen(part.temperature, { input: showTemperature });
  listen(part.go, { click: (event) => event.detail > 1 || goOrStop() }); // a double click is one
  listen(part.texts, { keydown: onKey });
  return async (tokens) => softmax(await makeReader(() => true)(tokens));
}

// A character in quotes, or its code point if it is invisible.
function nameOf(character) {
  const number = () => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  return character !== " " && /[\p{Z}\p{Cf}]/u.test(character) ? number() : JSON.stringify(character);
}

// The argmax of the logits with Gumbel noise is a sample of their softmax; without noise it is the most likely token.
function choose(logits, temperature) {
  const noise = () => (temperature ? -temperature * Math.log(-Math.log(1 - Math.random())) : 0);
  const noisy = Array.from(logits, (logit) => logit + noise());
  return noisy.indexOf(Math.max(...noisy));
}

let breathed = 0;

// Lets the browser paint and handle events, at most once per frame.
async function breathe() {
  if (performance.now() - breathed < 16) return false;
  await new Promise((done) => setTimeout(done));
  breathed = performance.now();
  return true;
}
