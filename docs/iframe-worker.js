// Search runs in a worker, which browsers refuse to pages opened from a folder: there a hidden frame does its work.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.scope = frame.contentWindow;
      this.scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const load = (src) =>
        new Promise((resolve, reject) => {
          const script = this.scope.document.createElement("script");
          Object.assign(script, { src, async: false, onload: resolve, onerror: reject });
          this.scope.document.body.append(script);
        });
      this.scope.importScripts = (...urls) => Promise.all(urls.map(load));
      this.ready = load(url);
    }

    async postMessage(data) {
      await this.ready;
      this.scope.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      this.scope.frameElement.remove();
    }
  };
}
