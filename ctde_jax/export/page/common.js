// Functions shared by pictures.js and texts.js.

export const part = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;

export function fail(sentence) {
  throw new Error(sentence);
}

export function say(trouble) {
  part.trouble.textContent = trouble;
  part.trouble.hidden = !trouble;
  if (trouble) part.trouble.scrollIntoView({ block: "nearest" });
}

export function listen(element, handlers) {
  for (const [name, handler] of Object.entries(handlers)) element.addEventListener(name, handler);
}

export function softmax(logits) {
  const highest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}
