// A drawing or an image file becomes the input of the model, and its probabilities become bars.

import { fail, listen, part, percent, say } from "./common.js";
import { clamp, cover, fit, trace, wipe } from "./ink.js";

const MOST_BARS = 12; // if there are more classes, only the most likely ones are shown
const make = (kind, className = "") => Object.assign(document.createElement(kind), { className });

export function startPictures(card, predict) {
  const [height, width, channels = 1] = card.input.shape;
  if (channels !== 1 && channels !== 3) fail(`The model takes ${channels} channels, but this page supports 1 or 3.`);
  const inColor = channels === 3;
  const names = Array.from({ length: card.output.shape[0] }, (_, label) => card.classes[label] ?? String(label));
  const large = part.board.getContext("2d");
  const small = part.seen.getContext("2d", { willReadFrequently: true });
  const bars = names.slice(0, MOST_BARS).map(() => make("li"));
  const pen = { at: [width / 2, height / 2], isDown: false, isShown: false, pointer: null };
  let strokes = []; // lists of points [x, y], in pixels of the model's picture
  let photo = null;
  let changes = 0;

  async function refresh() {
    paint();
    const change = ++changes;
    await new Promise(requestAnimationFrame);
    if (change !== changes) return; // the next one shows it too
    try {
      const pixels = see();
      show(pixels && (await predict(pixels)));
    } catch (error) {
      say(`The model failed: ${error.message}`);
    }
  }

  function paint() {
    const { color, accentColor } = getComputedStyle(part.board);
    wipe(large);
    if (photo) cover(large, photo);
    large.scale(part.board.width / width, part.board.height / height);
    large.strokeStyle = color;
    trace(large, strokes, 0.08 * height);
    if (!pen.isShown) return;
    large.beginPath();
    large.arc(...pen.at, 0.07 * height, 0, 2 * Math.PI);
    large.strokeStyle = accentColor;
    large.lineWidth = (pen.isDown ? 0.03 : 0.01) * height;
    large.stroke();
  }

  // Returns the pixels of the model's input; null if the board is empty.
  function see() {
    wipe(small);
    if (photo) cover(small, photo);
    else if (strokes.length) fit(small, strokes);
    else return null;
    const { data } = small.getImageData(0, 0, width, height);
    const isRead = (_, place) => (inColor ? place % 4 < 3 : place % 4 === 3); // ink is what is not transparent
    return data.filter(isRead).map((value) => Math.round((value * card.input.highest) / 255));
  }

  function show(shares) {
    const best = shares ? shares.indexOf(Math.max(...shares)) : -1;
    const order = names.map((_, label) => label);
    if (shares && names.length > MOST_BARS) order.sort((a, b) => shares[b] - shares[a]);
    bars.forEach((bar, row) => {
      const [name, , share] = bar.children;
      const label = order[row];
      name.textContent = names[label];
      share.textContent = shares ? percent(shares[label]) : "";
      bar.style.setProperty("--share", shares ? shares[label] : 0);
      bar.className = label === best ? "best" : "";
    });
    part.winner.textContent = shares ? names[best] : "nothing yet";
    part.winner.className = shares ? (names[best].length > 3 ? "long" : "") : "none";
    if (!pen.isDown) speak(shares ? `Prediction: ${names[best]}, ${percent(shares[best])}.` : "");
  }

  // Screen readers read a text again if it is set again, so an unchanged text is not set.
  function speak(sentence) {
    if (part.spoken.textContent !== sentence) part.spoken.textContent = sentence;
  }

  function lower(point) {
    pen.isDown = true;
    strokes.push([point]);
    refresh();
  }

  function lowerHere() {
    lower(pen.at);
    speak("The pen is down.");
  }

  function move(points) {
    if (!pen.isDown) return paint();
    const stroke = strokes.at(-1);
    for (const point of points) if (isApart(point, stroke.at(-1))) stroke.push(point);
    refresh();
  }

  // A mouse reports up to a thousand positions per second.
  function isApart(point, last) {
    return Math.hypot(point[0] - last[0], point[1] - last[1]) > height / 500;
  }

  function lift() {
    pen.isDown = false;
    refresh();
  }

  function undo() {
    strokes.pop();
    lift();
  }

  function clear() {
    [strokes, photo] = [[], null];
    say("");
    lift();
  }

  async function load([file]) {
    if (!file) return;
    const picture = await createImageBitmap(file).catch(() => null);
    say(picture ? "" : `${file.name} is not an image that this browser can read.`);
    photo = picture ?? photo;
    refresh();
  }

  function inside([x, y]) {
    return [clamp(x, 0, width), clamp(y, 0, height)];
  }

  function pointOf(event) {
    const { left, top } = part.board.getBoundingClientRect();
    const { clientLeft, clientTop, clientWidth, clientHeight } = part.board;
    const [x, y] = [event.clientX - left - clientLeft, event.clientY - top - clientTop];
    return inside([(x * width) / clientWidth, (y * height) / clientHeight]);
  }

  const pens = {
    pointerdown(event) {
      if (pen.pointer !== null || event.button !== 0) return; // only one finger draws
      part.board.setPointerCapture(event.pointerId);
      pen.pointer = event.pointerId;
      pen.isShown = false;
      lower(pointOf(event));
    },
    pointermove(event) {
      if (event.pointerId !== pen.pointer) return;
      const passed = event.getCoalescedEvents?.() ?? []; // since the last event
      move((passed.length ? passed : [event]).map(pointOf));
    },
    lostpointercapture(event) {
      if (event.pointerId !== pen.pointer) return;
      pen.pointer = null;
      lift();
    },
    keydown(event) {
      const step = height / 28;
      const ways = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      const acts = { " ": pen.isDown ? lift : lowerHere, Backspace: undo, Escape: clear, c: clear, C: clear };
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in ways || event.key in acts)) return;
      event.preventDefault();
      if (event.repeat && event.key in acts) return; // a key that is held acts once
      pen.isShown = true;
      if (event.key in acts) return acts[event.key]();
      pen.at = inside(pen.at.map((place, axis) => place + ways[event.key][axis]));
      move([pen.at]);
    },
    blur() {
      pen.isShown = false;
      lift();
    },
  };
  const files = {
    dragover: (event) => event.preventDefault(), // allows files to be dropped
    drop(event) {
      event.preventDefault();
      load(event.dataTransfer.files);
    },
    change() {
      load(part.file.files);
      part.file.value = ""; // so that the same file can be chosen again
    },
  };

  Object.assign(part.seen, { width, height });
  part.pictures.style.setProperty("--ratio", width / height);
  part.title.textContent = inColor ? "Choose an image, and the model classifies it" : "Draw, and the model classifies it";
  for (const bar of bars) bar.append(make("span"), make("span", "bar"), make("span", "share"));
  part.bars.append(...bars);
  part.pictures.hidden = false;

  if (inColor) {
    part.undo.remove();
    part.hint.remove();
    part.board.setAttribute("role", "img");
    part.board.setAttribute("aria-label", "The image");
    listen(document, files);
  } else {
    part.choose.remove();
    part.board.className = "drawn";
    part.board.tabIndex = 0;
    listen(part.board, pens);
  }
  listen(part.undo, { click: undo });
  listen(part.clear, { click: clear });
  listen(matchMedia("(prefers-color-scheme: dark)"), { change: paint });
  new ResizeObserver(() => {
    part.board.width = part.board.clientWidth * devicePixelRatio;
    part.board.height = part.board.clientHeight * devicePixelRatio;
    paint();
  }).observe(part.board);
  refresh();
  return predict;
}
