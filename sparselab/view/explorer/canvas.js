// A raster of codes: what arrives, how it is painted, what the mouse and the keys do. `Canvas` in canvas.py is its other half.
const bytes = view => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

const NS = "http://www.w3.org/2000/svg";
const rim = name => {
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("class", `sparselab-axis sparselab-${name}`);
  return svg;
};
// Ticks at round numbers of `axis` = {title, x0, dx}: pixel i of the raster stands for x0 + i * dx. In sight are the pixels `from`..`to`.
function ticks(svg, axis, from, to, length, upright) {
  svg.replaceChildren();
  if (!axis || !length || !(to > from)) return;
  const [low, high] = [from, to].map(at => axis.x0 + (at - 0.5) * axis.dx), rough = (high - low) / Math.max(2, length / 70);
  const power = 10 ** Math.floor(Math.log10(rough)), step = Math.max(1, power * [1, 2, 5, 10].find(each => each * power >= rough));
  const add = (text, x, y, anchor, turned) => {
    const node = document.createElementNS(NS, "text");
    node.textContent = text; node.setAttribute("x", x); node.setAttribute("y", y); node.setAttribute("text-anchor", anchor);
    if (turned) node.setAttribute("transform", `rotate(-90 ${x} ${y})`);
    svg.append(node);
  };
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) {
    const at = (value - low) / (high - low) * length, line = document.createElementNS(NS, "line");
    const name = (value || 0).toLocaleString("en");  // not -0
    const ends = upright ? { x1: 44, x2: 39, y1: at, y2: at } : { x1: at, x2: at, y1: 0, y2: 5 };
    for (const [key, end] of Object.entries(ends)) line.setAttribute(key, end);
    svg.append(line);
    if (upright) add(name, 37, Math.min(Math.max(at + 4, 9), length - 1), "end");
    else add(name, at, 15, at < 12 ? "start" : at > length - 12 ? "end" : "middle");
  }
  if (upright) add(axis.title, 9, length / 2, "middle", true);
  else add(axis.title, length / 2, 27, "middle");
}

export default () => {
  let codes = new Uint8Array(), held = 0, views = new Set();
  const whole = model => { codes = bytes(model.get("codes")).slice(); held = model.get("version"); };
  const take = model => {
    const patch = bytes(model.get("patch")), version = model.get("version");
    if (model.get("whole") === version) whole(model);
    else if (held === version - 1) {
      const n = patch.length / 5, places = new Uint32Array(patch.slice(0, 4 * n).buffer);
      for (let i = 0; i < n; i++) codes[places[i]] = patch[4 * n + i];
      held = version;
    } else {  // a patch of a raster that never arrived
      model.set("missed", version); model.save_changes();
    }
    for (const redraw of views) redraw();
  };
  return {
    initialize({ model }) {
      whole(model);
      listen(model);
      model.on("change:version", () => queueMicrotask(() => take(model)));  // a host may set the traits of a message one after another
    },
    render({ model, el }) {
      const box = document.createElement("div"), canvas = document.createElement("canvas");
      const tip = document.createElement("div"), line = document.createElement("div");
      const how = document.createElement("div"), upright = rim("upright"), level = rim("level");
      box.className = "sparselab-canvas"; tip.className = "sparselab-tip"; line.className = "sparselab-line"; how.className = "sparselab-tip sparselab-how";
      canvas.tabIndex = 0;
      box.dataset.lmSuppressShortcuts = "true";  // JupyterLab would take the arrow keys
      box.append(upright, canvas, level, line, tip, how); el.append(box);
      const data = box.dataset, shadow = document.createElement("canvas");
      let zoom = 1, left = 0, top = 0, pressed = null, drawn = 0, waiting = false, gone = false, down = null, ruled = "", hinted = 0;
      canvas.codes = () => codes;
      const tall = () => Math.round(model.get("height") * Math.max(1, innerHeight / 900));  // a higher window has room for more

      function paint() {  // -> the size of a block of weights that shares a pixel
        const [rows, columns] = model.get("shape"), palette = model.get("palette"), dense = devicePixelRatio || 1;
        const width = canvas.width = Math.max(1, Math.round(canvas.clientWidth * dense));
        const height = canvas.height = Math.round(tall() * dense);
        canvas.style.height = tall() + "px";
        if (!rows || !columns) return [1, 1];
        const down = Math.max(1, Math.ceil(rows / (height * zoom)));
        const across = Math.max(1, Math.ceil(columns / (width * zoom)));
        const h = Math.ceil(rows / down), w = Math.ceil(columns / across), image = new ImageData(w, h);
        const colours = new Uint32Array(256), pixels = new Uint32Array(image.data.buffer);
        palette.forEach(([r, g, b, opacity], i) => { colours[i] = (opacity << 24 | b << 16 | g << 8 | r) >>> 0; });
        if (down * across === 1) for (let i = 0; i < pixels.length; i++) pixels[i] = colours[codes[i]];
        else summarise(pixels, colours, rows, columns, down, across, w);
        shadow.width = w; shadow.height = h; shadow.getContext("2d").putImageData(image, 0, 0);
        const context = canvas.getContext("2d");
        context.imageSmoothingEnabled = false;
        context.drawImage(shadow, -left * width, -top * height, width * zoom, height * zoom);
        outline(context, width, height, rows, columns);
        rule(rows, columns, Math.round(width / dense), tall());
        return [down, across];
      }
      function summarise(pixels, colours, rows, columns, down, across, w) {
        const best = new Uint8Array(pixels.length), share = new Uint16Array(pixels.length);
        const block = Uint32Array.from({ length: columns }, (_, c) => Math.floor(c / across));
        for (let r = 0, i = 0; r < rows; r++) for (let c = 0, start = Math.floor(r / down) * w; c < columns; c++, i++) if (codes[i] > 1) {
          const at = start + block[c];
          share[at]++;
          if (codes[i] > best[at]) best[at] = codes[i];
        }
        for (let i = 0; i < pixels.length; i++) {
          const row = Math.floor(i / w) * down, column = i % w * across;
          const held = Math.min(down, rows - row) * Math.min(across, columns - column);  // fewer at the edges
          const colour = colours[best[i] || 1], faint = 0.4 + 0.6 * share[i] / held;
          pixels[i] = best[i] ? (colour & 0xffffff | Math.round((colour >>> 24) * faint) << 24) >>> 0 : colour;
        }
      }
      function outline(context, width, height, rows, columns) {
        const [row, column, down, across] = model.get("mark");
        const tall = height * zoom / rows, wide = width * zoom / columns;
        context.strokeStyle = getComputedStyle(box).color; context.lineWidth = 2;
        if (row >= 0) context.strokeRect(-left * width, row * tall - top * height, width * zoom, Math.max(down * tall, 3));
        if (column >= 0) context.strokeRect(column * wide - left * width, -top * height, Math.max(across * wide, 3), height * zoom);
      }
      function rule(rows, columns, wide, high) {  // the axes of what is in sight, when that has changed
        const { x, y } = model.get("axes"), view = [wide, high, zoom, left, top, rows, columns];
        const now = JSON.stringify([view, x, y]);
        if (now === ruled) return;
        ruled = now; data.zoom = zoom.toFixed(2);
        ticks(level, x, left / zoom * columns, (left + 1) / zoom * columns, wide, false);
        ticks(upright, y, top / zoom * rows, (top + 1) / zoom * rows, high, true);
      }
      const redraw = () => {
        if (waiting) return;
        waiting = true;
        requestAnimationFrame(function frame() {
          if (!canvas.clientWidth) {  // hidden, as for a moment while JupyterLab changes its theme: nothing tells when it is in sight again
            if (!gone) setTimeout(() => requestAnimationFrame(frame), 100);
            return;
          }
          waiting = false;
          const [down, across] = paint();
          const summary = down * across > 1 ? ` · zoomed out: a pixel stands for ${down} x ${across}` : "";
          line.textContent = model.get("label") + summary;
          data.version = model.get("version"); data.mark = model.get("mark"); data.drawn = ++drawn;
          if (pressed && model.get("version") !== pressed.version) {
            data.latency = (performance.now() - pressed.at).toFixed(1); pressed = null;
          }
        });
      };
      const place = event => {
        const [rows, columns] = model.get("shape"), frame = canvas.getBoundingClientRect();
        const x = ((event.clientX - frame.left) / frame.width + left) / zoom;
        const y = ((event.clientY - frame.top) / frame.height + top) / zoom;
        return [Math.min(rows - 1, Math.max(0, Math.floor(y * rows))), Math.min(columns - 1, Math.max(0, Math.floor(x * columns)))];
      };
      const tell = (name, value) => { model.set(name, value); model.save_changes(); };
      const clamp = () => {
        left = Math.min(Math.max(left, 0), zoom - 1); top = Math.min(Math.max(top, 0), zoom - 1); redraw();
      };
      canvas.onwheel = event => {
        if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) {  // the page scrolls
          how.textContent = "Ctrl + wheel zooms; so does the wheel after a click";
          clearTimeout(hinted); hinted = setTimeout(() => { how.textContent = ""; }, 2500);
          return;
        }
        event.preventDefault();
        const frame = canvas.getBoundingClientRect(), before = zoom;
        const x = (event.clientX - frame.left) / frame.width, y = (event.clientY - frame.top) / frame.height;
        zoom = Math.min(64, Math.max(1, zoom * Math.exp(-event.deltaY / 400)));
        left = (left + x) * zoom / before - x; top = (top + y) * zoom / before - y; clamp();
      };
      box.ontransitionend = box.ontransitioncancel = redraw;  // another theme: outlines have its colour, also when its style sheets change twice
      canvas.ondblclick = () => everything();
      canvas.onpointerdown = event => {
        const at = place(event);  // before the focus, which may move the page
        canvas.focus({ preventScroll: true }); canvas.setPointerCapture(event.pointerId);
        down = [event.clientX, event.clientY, left, top, at];
      };
      canvas.onpointerup = event => {
        const moved = down ? Math.hypot(event.clientX - down[0], event.clientY - down[1]) : 9;
        if (moved < 4) tell("clicked", [...down[4], model.get("clicked")[2] + 1]);
        down = null;
      };
      canvas.onpointermove = event => {
        const frame = canvas.getBoundingClientRect();
        const x = event.clientX - frame.left, y = event.clientY - frame.top;
        if (down) {
          left = down[2] - (event.clientX - down[0]) / frame.width; top = down[3] - (event.clientY - down[1]) / frame.height;
          clamp();
        }
        tip.style.left = canvas.offsetLeft + Math.min(x + 12, frame.width * 0.7) + "px"; tip.style.top = y + 12 + "px";
        const at = place(event), last = model.get("hover");
        if (at[0] !== last[0] || at[1] !== last[1]) { tip.textContent = ""; tell("hover", at); }
      };
      canvas.onpointerleave = () => { tip.textContent = ""; tell("hover", [-1, -1]); };
      canvas.onkeydown = event => {
        if (event.key === "Escape") canvas.blur();
        if (!["ArrowLeft", "ArrowRight", "Home", "End", " "].includes(event.key)) return;
        event.preventDefault(); event.stopPropagation();
        pressed = { at: performance.now(), version: model.get("version") };
        const [count, ...names] = model.get("presses");
        tell("presses", [count + 1, ...names.slice(-31), event.key]);  // what is pressed while the kernel is busy arrives as one
      };
      const hint = () => { tip.textContent = model.get("tip"); };
      const everything = () => { zoom = 1; left = top = 0; redraw(); };
      const listened = { "change:tip": hint, "change:mark": redraw, "change:label": redraw, "change:palette": redraw,
                         "change:axes": redraw, "change:subject": everything };
      for (const [name, act] of Object.entries(listened)) model.on(name, act);
      views.add(redraw);
      const resized = new ResizeObserver(redraw); resized.observe(box);
      window.addEventListener("resize", redraw);
      redraw();
      return () => {
        gone = true; views.delete(redraw); resized.disconnect(); window.removeEventListener("resize", redraw);
        for (const [name, act] of Object.entries(listened)) model.off(name, act);
      };
    },
  };
};
