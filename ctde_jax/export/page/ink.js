// Drawing on a canvas: strokes, which are lists of points [x, y], and images.

export const clamp = (value, least, most) => Math.min(Math.max(value, least), most);

export function wipe(context) {
  context.resetTransform();
  context.clearRect(0, 0, context.canvas.width, context.canvas.height);
}

export function trace(context, strokes, thickness) {
  context.beginPath();
  for (const stroke of strokes) {
    context.moveTo(...stroke[0]);
    for (const [x, y] of stroke) context.lineTo(x + 1e-3, y); // a dot is a short line
  }
  Object.assign(context, { lineWidth: thickness, lineCap: "round", lineJoin: "round" });
  context.stroke();
}

// Scales a drawing as in MNIST: it fills 20/28 of the side, with its center of mass in the middle. It fills images that
// are too small for a margin, such as the 8 x 8 ones of scikit-learn. The thickness does not depend on the drawn size.
export function fit(context, strokes) {
  const sides = [context.canvas.width, context.canvas.height];
  const fills = Math.min(...sides) < 16 ? 1 : 20 / 28;
  const thickness = Math.max(1.8, (fills * Math.min(...sides)) / 8);
  const points = strokes.flat();
  const low = sides.map((_, axis) => points.reduce((least, point) => Math.min(least, point[axis]), Infinity));
  const high = sides.map((_, axis) => points.reduce((most, point) => Math.max(most, point[axis]), -Infinity));
  const most = sides.map((side, axis) => (fills * side - thickness) / (high[axis] - low[axis]));
  const scale = Math.min(4, ...most); // a dot stays one
  const draw = (shift) => {
    wipe(context);
    context.setTransform(scale, 0, 0, scale, ...shift);
    context.strokeStyle = "white";
    trace(context, strokes, thickness / scale);
  };

  const centered = sides.map((side, axis) => (side - scale * (low[axis] + high[axis])) / 2);
  draw(centered);
  const mass = centerOfMass(context.getImageData(0, 0, ...sides));
  const shift = sides.map((side, axis) => {
    const margin = (side - scale * (high[axis] - low[axis]) - thickness) / 2;
    return centered[axis] + clamp(side / 2 - mass[axis], -margin, margin);
  });
  draw(shift);
}

function centerOfMass({ data, width }) {
  let [sum, x, y] = [0, 0, 0];
  for (let pixel = 0; pixel < data.length / 4; pixel++) {
    const ink = data[4 * pixel + 3];
    sum += ink;
    x += ink * ((pixel % width) + 0.5);
    y += ink * (Math.floor(pixel / width) + 0.5);
  }
  return [x / sum, y / sum];
}

// Draws the center of an image, scaled to cover the canvas.
export function cover(context, picture) {
  const { width, height } = context.canvas;
  const scale = Math.max(width / picture.width, height / picture.height);
  const [wide, high] = [width / scale, height / scale];
  Object.assign(context, { fillStyle: "white", imageSmoothingQuality: "high" });
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, (picture.width - wide) / 2, (picture.height - high) / 2, wide, high, 0, 0, width, height);
}
