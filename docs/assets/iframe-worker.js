// Search runs in a web worker, which browsers refuse to a page that was opened as a file. Such a page gets this one
// instead: the same script in a hidden frame, with the same messages.
"use strict"
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.title = "search"
      document.body.append(frame)
      this.inner = frame.contentWindow
      this.inner.IFrameWorker = window.IFrameWorker
      this.inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = this.inner.document.createElement("script")
      script.src = String(url)
      script.onload = () => {
        this.waiting.forEach(data => this.hand(data))
        this.waiting = null
      }
      this.inner.document.body.append(script)
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.hand(data)
    }

    hand(data) {
      this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data }))
    }
  }
}
