// Runs the model of card.json on this device; all files are fetched from the folder of this page.

import { fail, part, percent, say, softmax } from "./common.js";
import { startPictures } from "./pictures.js";
import { readPlaces, readWindows, startTexts } from "./texts.js";

const NEWEST_FORMAT = 1;
const COMPILED = "ort/ort-wasm-simd-threaded.wasm";
const canCheck = Boolean(window.crypto?.subtle); // a browser has it on https and on localhost

async function start() {
  part.late.remove(); // its text is for browsers that do not run the script
  const card = await getFacts("card.json");
  if (card.format > NEWEST_FORMAT) fail(`card.json has format ${card.format}, but the page supports ${NEWEST_FORMAT}.`);
  const { file: whole, step } = card.artifacts.onnx;
  const isText = card.vocabulary.length > 0;
  const file = isText && step ? step : whole;
  const runtime = await getFacts("ort/files.json");
  const megabytes = (card.files[file].bytes + runtime[COMPILED].bytes) / 1e6;
  part.loading.textContent = `Loading the model and its runtime, ${megabytes.toFixed(0)} MB …`;
  const model = await getChecked(file, card.files[file]);

  const wasmBinary = await getChecked(COMPILED, runtime[COMPILED]);
  const ort = await import("./ort/ort.wasm.min.js").catch(() => fail("ort/ort.wasm.min.js could not be imported."));
  const wasmPaths = { mjs: new URL("./ort/ort-wasm-simd-threaded.js", import.meta.url).href };
  Object.assign(ort.env.wasm, { wasmBinary, wasmPaths, numThreads: 1 }); // more threads need a server's own headers
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] }).catch((error) =>
    fail(`The model cannot run in this browser: ${error.message}`),
  );
  const run = (inputs) => {
    const tensors = Object.entries(inputs).map(([name, given]) => [name, new ort.Tensor(...given)]);
    return session.run(Object.fromEntries(tensors));
  };

  showFacts(card, file);
  part.waiting.hidden = true;
  const makeReader = file === step ? readPlaces : readWindows;
  if (isText) return startTexts(card.vocabulary, (isWanted) => makeReader(card, run, isWanted));
  return startPictures(card, async (pixels) => {
    const inputs = ["uint8", Uint8Array.from(pixels), [1, ...card.input.shape]];
    return softmax((await run({ inputs })).outputs.data);
  });
}

async function get(name) {
  const lost = () => fail(`${name} could not be loaded: there is no server.`);
  const response = await fetch(name, { cache: "no-cache" }).catch(lost);
  return response.ok ? response : fail(`${name} could not be loaded: the server returned status ${response.status}.`);
}

async function getFacts(name) {
  return (await get(name)).json().catch(() => fail(`${name} is damaged: copy the folder again.`));
}

async function getChecked(name, expected) {
  const cut = () => fail(`${name} was loaded only in part: the connection was lost.`);
  const content = new Uint8Array(await (await get(name)).arrayBuffer().catch(cut));
  const digest = canCheck ? toHex(await crypto.subtle.digest("SHA-256", content)) : expected.sha256;
  if (content.length === expected.bytes && digest === expected.sha256) return content;
  return fail(`${name} does not match its checksum, so the model does not run: copy the folder again.`);
}

function toHex(buffer) {
  return Array.from(new Uint8Array(buffer), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function refuse(error) {
  part.waiting.hidden = true;
  say(error.message);
  return false;
}

function showFacts(card, file) {
  const { accuracy } = card.trained_model.measured;
  const digits = `SHA-256 ${card.files[file].sha256.slice(0, 12)}…`;
  const facts = [
    `trained on ${card.data.name}`,
    `${card.model.parameters.toLocaleString("en")} parameters`,
    ...(accuracy === undefined ? [] : [`test accuracy ${percent(accuracy, 2)}`]),
    "runs only on this device",
    canCheck ? `${digits} checked` : `${digits} not checked, because browsers can only do so on https and localhost`,
  ];
  part.facts.textContent = facts.join(" · ");
}

// For tests. `ready` becomes true if the model runs, or false if the page shows an error. `predict` takes one raw
// example, pixels or the tokens so far, and returns the probabilities of the classes or of the next token.
const started = start();
window.page = { ready: started.then(() => true, refuse), predict: async (example) => (await started)(example) };
