// A picture that can be moved and zoomed: by wheel and drag, and by keys. Drawn once a frame, only when something changed.

import { h, hideTip } from "./dom.js";

export class Picture {
  // draw(pen, picture), click(x, y, twice), hover(x, y, event) in the picture's own coordinates; `flat`: only x zooms.
  constructor({ label, draw, click, hover, flat = false, most = 8 }) {
    Object.assign(this, { paint: draw, flat, most, kx: 1, ky: 1, x: 0, y: 0, waiting: false, world: null });
    this.canvas = h("canvas", { tabindex: 0, role: "img", "aria-label": label });
    this.element = h("div", { class: "picture" }, this.canvas);
    this.canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.drags(click, hover);
    new ResizeObserver(() => { if (this.world && !this.touched) this.fit(this.world); this.draw(); }).observe(this.element);
  }
  get width() { return this.element.clientWidth; }
  get height() { return this.element.clientHeight; }
  toWorld(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left - this.x) / this.kx, (event.clientY - box.top - this.y) / this.ky];
  }
  drags(click, hover) {
    let from = null;
    let moved = false;
    this.canvas.addEventListener("pointerdown", (event) => { from = [event.clientX - this.x, event.clientY - this.y, event.clientX, event.clientY]; moved = false; this.canvas.setPointerCapture(event.pointerId); });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!from) { hover?.(...this.toWorld(event), event); return; }
      if (Math.hypot(event.clientX - from[2], event.clientY - from[3]) > 4) moved = true;
      if (moved) { hideTip(); this.touched = true; this.x = event.clientX - from[0]; if (!this.flat) this.y = event.clientY - from[1]; this.draw(); }
    });
    this.canvas.addEventListener("pointerup", (event) => { if (from && !moved) click?.(...this.toWorld(event), false); from = null; });
    this.canvas.addEventListener("dblclick", (event) => click?.(...this.toWorld(event), true));
    this.canvas.addEventListener("pointerleave", hideTip);
  }
  wheel(event) {
    event.preventDefault();
    hideTip();
    const box = this.canvas.getBoundingClientRect();
    if (event.shiftKey || (Math.abs(event.deltaX) > Math.abs(event.deltaY))) this.pan(-(event.deltaX || event.deltaY), 0);
    else this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0018)), event.clientX - box.left, event.clientY - box.top);
  }
  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const next = Math.max(this.least ?? 1e-4, Math.min(this.most, this.kx * factor));
    const by = next / this.kx;
    this.touched = true;
    this.x = x - (x - this.x) * by;
    this.kx = next;
    if (!this.flat) { this.y = y - (y - this.y) * by; this.ky = next; }
    this.draw();
  }
  pan(x, y) { this.touched = true; this.x += x; if (!this.flat) this.y += y; this.draw(); }
  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (event.key in moves) this.pan(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoom(1.25);
    else if (event.key === "-") this.zoom(0.8);
    else if (event.key === "0") this.fit(this.world);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
  // Shows a box of the picture's coordinates whole.
  fit([x, y, w, h], most = 1.4) {
    this.world = [x, y, w, h];
    this.touched = false;
    if (!this.width || !this.height) return;
    const pad = this.flat ? 12 : 24;
    const kx = (this.width - 2 * pad) / Math.max(w, 1e-6);
    const ky = (this.height - 2 * pad) / Math.max(h, 1e-6);
    this.kx = this.flat ? kx : Math.min(kx, ky, most);
    this.least = Math.min(this.kx, 1) * 0.5;
    if (this.flat) this.most = Math.max(this.kx, 400);
    this.x = this.flat ? pad - x * this.kx : (this.width - w * this.kx) / 2 - x * this.kx;
    if (!this.flat) { this.ky = this.kx; this.y = (this.height - h * this.ky) / 2 - y * this.ky; }
    this.draw();
  }
  // Moves so that a box is in sight, at a zoom where it can be read.
  show([x, y, w, h], least) {
    if (this.kx < least) { this.kx = least; if (!this.flat) this.ky = least; }
    this.touched = true;
    const seen = [this.x + x * this.kx, this.y + y * this.ky];
    const inside = seen[0] > 20 && seen[0] + w * this.kx < this.width - 20 && (this.flat || (seen[1] > 20 && seen[1] + h * this.ky < this.height - 20));
    if (!inside) {
      this.x = this.width / 2 - (x + w / 2) * this.kx;
      if (!this.flat) this.y = this.height / 2 - (y + h / 2) * this.ky;
    }
    this.draw();
  }
  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      const { width, height } = this;
      if (!width || !height) return;
      const scale = devicePixelRatio;
      if (this.canvas.width !== Math.round(width * scale) || this.canvas.height !== Math.round(height * scale)) {
        this.canvas.width = Math.round(width * scale);
        this.canvas.height = Math.round(height * scale);
      }
      const pen = this.canvas.getContext("2d");
      pen.setTransform(scale, 0, 0, scale, 0, 0);
      pen.clearRect(0, 0, width, height);
      this.paint(pen, this);
    });
  }
}

// The theme's colors, read anew for each drawing: the theme may have changed.
export function palette() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

export const MONO = "ui-monospace, 'SF Mono', 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace";
export const SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif";
