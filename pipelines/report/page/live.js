// The live view: the patch, or the box of patches, that is pointed at is compared with every patch of every photo.
// dino_ops/compact_descriptors.py does the same sums, in the same order, with the same roundings.
(() => {
  const source = document.getElementById("live-data");
  if (!source) return;
  const REGION_QUERY_STEPS = 32767;
  const data = JSON.parse(source.textContent);
  const width = data.dimensions; // a multiple of 8
  const codes = decode(data.codes);
  const count = codes.length / width;
  const inverse = new Float64Array(count); // one over each code's length, 0 for a patch that is not stored
  for (let patch = 0; patch < count; patch++) inverse[patch] = inverseLength(codes, patch * width);
  const similarity = new Float32Array(count);
  const colours = new Uint32Array(256);
  const little = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
  data.colours.forEach((colour, at) => {
    const value = parseInt(colour, 16);
    const [red, green, blue] = [value >> 16, (value >> 8) & 255, value & 255];
    const alpha = data.faint + Math.round(((255 - data.faint) * at) / 255);
    colours[at] = little
      ? ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0
      : ((red << 24) | (green << 16) | (blue << 8) | alpha) >>> 0;
  });

  const $ = (id) => document.getElementById(id);
  const gallery = $("live-gallery"), status = $("live-status"), said = $("live-said");
  const release = $("live-release"), boxing = $("live-box"), opacity = $("live-opacity");
  const query = $("live-query");
  const found = [...$("live-found").children].map((figure) => ({
    figure, svg: figure.querySelector("svg"), caption: figure.querySelector("figcaption"),
  }));

  const weak = data.low + 0.3 * (data.high - data.low); // a best match that is hardly one
  let first = 0;
  const images = [...gallery.children].map((tile, number) => {
    const about = data.images[number];
    const [rows, columns] = about.grid, [left, top, wide, high] = about.place, [W, H] = about.size;
    const canvas = tile.querySelector("canvas");
    canvas.width = columns;
    canvas.height = rows;
    Object.assign(canvas.style, {
      left: `${(100 * left) / W}%`, top: `${(100 * top) / H}%`,
      width: `${(100 * wide) / W}%`, height: `${(100 * high) / H}%`,
    });
    const context = canvas.getContext("2d", { willReadFrequently: true }); // small, and only written: kept off the GPU
    const pixels = context.createImageData(columns, rows);
    const best = tile.querySelector(".best");
    best.setAttribute("r", String(0.035 * Math.max(W, H)));
    const image = {
      number, tile, id: about.id, photo: about.photo, rows, columns, first, W, H, left, top,
      cellWidth: wide / columns, cellHeight: high / rows, context, pixels, words: new Uint32Array(pixels.data.buffer),
      mark: tile.querySelector(".mark"), best, value: tile.querySelector(".value"), stack: tile.querySelector(".stack"),
      visible: true, stale: false, at: -1, top1: 0,
    };
    first += rows * columns;
    return image;
  });

  // What is asked: a rectangle of patches of one image, corners included.
  let asked = { image: data.start[0], row: data.start[1], column: data.start[2], row2: data.start[1], column2: data.start[2] };
  let pinned = false, scheduled = false, dragging = null, talking = 0;

  function decode(text) {
    const raw = atob(text), bytes = new Int8Array(raw.length);
    for (let at = 0; at < raw.length; at++) bytes[at] = raw.charCodeAt(at);
    return bytes;
  }

  function inverseLength(values, at) {
    let squares = 0;
    for (let k = 0; k < width; k++) squares += values[at + k] * values[at + k];
    return squares > 0 ? 1 / Math.sqrt(squares) : 0;
  }

  function patchesOf(box) {
    const image = images[box.image], list = [];
    for (let row = Math.min(box.row, box.row2); row <= Math.max(box.row, box.row2); row++)
      for (let column = Math.min(box.column, box.column2); column <= Math.max(box.column, box.column2); column++)
        list.push(image.first + row * image.columns + column);
    return list;
  }

  function queryOf(patches) {
    const result = new Int32Array(width);
    if (patches.length === 1) {
      for (let k = 0; k < width; k++) result[k] = codes[patches[0] * width + k];
      return result;
    }
    const total = new Float64Array(width);
    for (const patch of patches)
      for (let k = 0; k < width; k++) total[k] += codes[patch * width + k] * inverse[patch];
    let largest = 0;
    for (const value of total) largest = Math.max(largest, Math.abs(value));
    for (let k = 0; k < width; k++) result[k] = largest > 0 ? Math.floor((total[k] / largest) * REGION_QUERY_STEPS + 0.5) : 0;
    return result;
  }

  // Whole numbers below 2 ** 31 all the way, which browsers multiply fastest; four sums at a time keep them busy.
  function compare(asking) {
    const own = inverseLength(asking, 0);
    for (const image of images) {
      let best = -Infinity, where = -1;
      const end = image.first + image.rows * image.columns;
      for (let patch = image.first; patch < end; patch++) {
        let a = 0, b = 0, c = 0, d = 0;
        for (let k = 0, at = patch * width; k < width; k += 4, at += 4) {
          a = (a + Math.imul(asking[k], codes[at])) | 0;
          b = (b + Math.imul(asking[k + 1], codes[at + 1])) | 0;
          c = (c + Math.imul(asking[k + 2], codes[at + 2])) | 0;
          d = (d + Math.imul(asking[k + 3], codes[at + 3])) | 0;
        }
        const value = (a + b + c + d) * inverse[patch] * own;
        similarity[patch] = value;
        if (value > best && inverse[patch] > 0) {
          best = value;
          where = patch - image.first;
        }
      }
      image.at = where;
      image.top1 = best;
    }
  }

  function draw(image) {
    image.stale = false;
    const { words, first: start } = image, scale = 255 / (data.high - data.low);
    for (let at = 0; at < words.length; at++) {
      const level = (similarity[start + at] - data.low) * scale;
      words[at] = inverse[start + at] === 0 ? 0 : colours[level <= 0 ? 0 : level >= 255 ? 255 : level | 0];
    }
    image.context.putImageData(image.pixels, 0, 0);
  }

  function clear(image) {
    image.stale = false;
    image.words.fill(0);
    image.context.putImageData(image.pixels, 0, 0);
  }

  function boxOf(image, row, column, row2 = row, column2 = column) {
    return [
      image.left + Math.min(column, column2) * image.cellWidth, image.top + Math.min(row, row2) * image.cellHeight,
      (Math.abs(column2 - column) + 1) * image.cellWidth, (Math.abs(row2 - row) + 1) * image.cellHeight,
    ];
  }

  function place(rect, [x, y, w, h]) {
    rect.setAttribute("x", x);
    rect.setAttribute("y", y);
    rect.setAttribute("width", w);
    rect.setAttribute("height", h);
  }

  // A piece of a photo around a box, square, with the box framed.
  function magnify(svg, image, box) {
    const side = Math.max(0.3 * Math.min(image.W, image.H), 1.6 * Math.max(box[2], box[3]));
    const x = box[0] + box[2] / 2 - side / 2, y = box[1] + box[3] / 2 - side / 2;
    svg.setAttribute("viewBox", `${x} ${y} ${side} ${side}`);
    svg.querySelector("use").setAttribute("href", `#photo-${image.photo}`);
    place(svg.querySelector("rect"), box);
  }

  function update() {
    scheduled = false;
    const start = performance.now();
    const from = images[asked.image], patches = patchesOf(asked);
    compare(queryOf(patches));
    const box = boxOf(from, asked.row, asked.column, asked.row2, asked.column2);
    const ranked = images.filter((image) => image !== from && image.at >= 0).sort((one, other) => other.top1 - one.top1);
    const leading = new Set(ranked.slice(0, 3));
    for (const image of images) {
      const own = image === from;
      image.tile.classList.toggle("source", own);
      image.tile.classList.toggle("hit", !own && image.at >= 0);
      image.tile.classList.toggle("first", leading.has(image));
      image.tile.classList.toggle("weak", !own && image.top1 < weak);
      if (own) {
        clear(image);
        place(image.mark, box);
        image.value.textContent = "";
      } else if (image.at >= 0) {
        if (image.visible) draw(image);
        else image.stale = true;
        const [x, y, w, h] = boxOf(image, Math.floor(image.at / image.columns), image.at % image.columns);
        image.best.setAttribute("cx", x + w / 2);
        image.best.setAttribute("cy", y + h / 2);
        image.value.textContent = image.top1.toFixed(2);
        image.tile.dataset.best = image.at;
        image.tile.dataset.similarity = image.top1;
      }
    }
    magnify(query, from, box);
    found.forEach(({ figure, svg, caption }, rank) => {
      const image = ranked[rank];
      figure.hidden = !image;
      if (!image) return;
      magnify(svg, image, boxOf(image, Math.floor(image.at / image.columns), image.at % image.columns));
      caption.textContent = `${rank + 1}. ${image.top1.toFixed(2)}`;
    });
    const spot = patches.length === 1
      ? `row ${asked.row + 1} of ${from.rows}, column ${asked.column + 1} of ${from.columns}`
      : `a box of ${patches.length} patches`;
    const bests = ranked.slice(0, 3).map((image) => `${image.id} (${image.top1.toFixed(2)})`).join(", ");
    status.textContent = `${pinned ? "Kept: " : ""}${from.id}, ${spot}.`;
    window.clearTimeout(talking);
    talking = window.setTimeout(() => {
      said.textContent = `${pinned ? "Kept. " : ""}${from.id}, ${spot}. Most similar: ${bests || "nothing"}.`;
    }, 400);
    release.disabled = !pinned;
    performance.clearMeasures("dinoray-live");
    performance.measure("dinoray-live", { start, end: performance.now() });
  }

  function schedule() {
    if (scheduled) return;
    scheduled = true;
    window.requestAnimationFrame(update);
  }

  function ask(next) {
    if (Object.keys(next).every((key) => next[key] === asked[key])) return;
    asked = next;
    schedule();
  }

  function pin(on) {
    pinned = on;
    schedule();
  }

  function spotOf(image, event) {
    const bounds = image.stack.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) / bounds.width) * image.W;
    const y = ((event.clientY - bounds.top) / bounds.height) * image.H;
    const limit = (value, most) => Math.min(Math.max(Math.floor(value), 0), most - 1);
    return {
      row: limit((y - image.top) / image.cellHeight, image.rows),
      column: limit((x - image.left) / image.cellWidth, image.columns),
    };
  }

  const at = (image, row, column) => ({ image: image.number, row, column, row2: row, column2: column });

  function stored(image, row, column) {
    return inverse[image.first + row * image.columns + column] > 0;
  }

  gallery.addEventListener("pointermove", (event) => {
    if (dragging) {
      const { row, column } = spotOf(dragging.image, event);
      const far = Math.hypot(event.clientX - dragging.x, event.clientY - dragging.y) > 6;
      if ((far || dragging.moved) && (event.pointerType !== "touch" || dragging.boxing)) {
        dragging.moved = true;
        ask({ image: dragging.image.number, row: dragging.row, column: dragging.column, row2: row, column2: column });
      }
      return;
    }
    if (pinned || event.pointerType === "touch") return;
    const tile = event.target.closest(".live");
    if (!tile) return;
    const image = images[tile.dataset.image], { row, column } = spotOf(image, event);
    if (stored(image, row, column)) ask(at(image, row, column));
  });

  gallery.addEventListener("pointerdown", (event) => {
    const tile = event.target.closest(".live");
    if (!tile || event.button !== 0 || !event.isPrimary) return;
    const image = images[tile.dataset.image];
    const inBox = boxing.getAttribute("aria-pressed") === "true";
    dragging = { image, ...spotOf(image, event), x: event.clientX, y: event.clientY, moved: false, boxing: inBox };
    if (event.pointerType !== "touch" || inBox) tile.setPointerCapture(event.pointerId);
  });

  gallery.addEventListener("pointerup", (event) => {
    if (!dragging) return;
    const { image, row, column, moved } = dragging;
    dragging = null;
    if (moved) return pin(true);
    if (!stored(image, row, column)) return;
    const next = at(image, row, column);
    const same = Object.keys(next).every((key) => next[key] === asked[key]);
    if (pinned && same) return pin(false);
    ask(next);
    pin(true);
  });

  gallery.addEventListener("pointercancel", () => {
    dragging = null; // the page is being scrolled
  });

  gallery.addEventListener("focusin", (event) => {
    const tile = event.target.closest(".live");
    if (!tile || pinned || dragging || !tile.matches(":focus-visible")) return;
    const image = images[tile.dataset.image];
    if (asked.image !== image.number) ask(at(image, Math.floor(image.rows / 2), Math.floor(image.columns / 2)));
  });

  const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  gallery.addEventListener("keydown", (event) => {
    const tile = event.target.closest(".live");
    if (!tile || event.ctrlKey || event.metaKey || event.altKey) return;
    const image = images[tile.dataset.image];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (asked.image !== image.number) ask(at(image, Math.floor(image.rows / 2), Math.floor(image.columns / 2)));
      pin(true);
    } else if (MOVES[event.key]) {
      event.preventDefault();
      const own = asked.image === image.number;
      const from = own ? asked : at(image, Math.floor(image.rows / 2), Math.floor(image.columns / 2));
      const row = Math.min(Math.max(from.row2 + MOVES[event.key][0], 0), image.rows - 1);
      const column = Math.min(Math.max(from.column2 + MOVES[event.key][1], 0), image.columns - 1);
      ask(event.shiftKey ? { ...from, row2: row, column2: column } : at(image, row, column));
    }
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && pinned) pin(false);
  });
  release.addEventListener("click", () => pin(false));
  boxing.addEventListener("click", () => {
    const on = boxing.getAttribute("aria-pressed") !== "true";
    boxing.setAttribute("aria-pressed", String(on));
    gallery.classList.toggle("boxing", on);
  });
  opacity.addEventListener("input", () => gallery.style.setProperty("--heat", String(opacity.value / 100)));
  gallery.style.setProperty("--heat", String(opacity.value / 100));

  // Heat maps that are out of sight are drawn when they come into it.
  const watching = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const image = images[target.dataset.image];
      image.visible = isIntersecting;
      if (isIntersecting && image.stale) draw(image);
    }
  }, { rootMargin: "200px" });
  for (const image of images) watching.observe(image.tile);

  update();
})();
